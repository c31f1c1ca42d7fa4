// Tokenize texts with llama.cpp: node tokenizer_ids.mjs MODEL.gguf < texts.json > ids.json
// Run it in the folder whose node_modules holds node-llama-cpp.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`);
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[2], vocabOnly: true });
const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const texts = JSON.parse(Buffer.concat(chunks).toString("utf8"));
const ids = texts.map((text) => ({
  plain: model.tokenize(text, false),
  special: model.tokenize(text, true),
}));
await new Promise((written) => process.stdout.write(JSON.stringify(ids), written));
await model.dispose();
process.exit(0);
