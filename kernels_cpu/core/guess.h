// A step of a draft head: what enters its layer, the layer, and the logits of what it guesses.
#pragma once

#include "core/decoder.h"

namespace localllm {

// x = from_hidden norm(h) + from_embedding norm(e), see models/draft_head.py.
struct HeadParts {
  const Matrix *from_hidden, *from_embedding;  // [hidden, hidden]
  const Matrix* head;                          // [guessed, hidden], or null: the model's own
  NormParams hidden_norm, embedding_norm;
};

// layer: a draft head's, which is a decoder of one layer that is given its inputs. hidden
// [step.rows, hidden]: the model's states, or guesses at them. following [step.rows]: the token
// after each. Of the last row of each chunk: the state it guesses, into `states` [chunks, hidden],
// and its logits, into `logits`. False when cancelled.
bool guess(Decoder& model, Decoder& layer, const HeadParts& parts, Step step, const float* hidden,
           const int32_t* following, float* states, float* logits);

}  // namespace localllm
