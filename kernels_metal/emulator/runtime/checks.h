// What clang's undefined-behaviour checks call; the layouts are those of its runtime.
#pragma once
#include "fault.h"

struct Place { const char *file; u32 line, column; };
struct TypeName { u16 kind, info; char name[1]; };
struct AtPlace { Place place; };
struct OfType { Place place; const TypeName *type; };
struct OfTypes { Place place; const TypeName *left, *right; };

static void copy_text(char *to, const char *from, u64 room) {
  u64 i = 0;
  for (; from[i] && i + 1 < room; i++) to[i] = from[i];
  to[i] = 0;
}

[[noreturn]] static void fails(Kind kind, const Place &place, const TypeName *type, int64_t extra) {
  if (first_fault(kind, 0)) {
    report->has_line = 1;
    report->line = place.line;
    report->column = place.column;
    copy_text(report->file, place.file ? place.file : "", sizeof report->file);
    if (type) copy_text(report->text, type->name, sizeof report->text);
    report->extra = extra;
  }
  stop();
}

#define MSL_CHECK extern "C" __attribute__((visibility("default"))) void
MSL_CHECK __ubsan_handle_out_of_bounds(OfTypes *at, u64 index) {
  fails(ARRAY_INDEX, at->place, at->left, (int64_t)index);
}
MSL_CHECK __ubsan_handle_divrem_overflow(OfType *at, u64, u64) {
  fails(DIVISION_BY_ZERO, at->place, at->type, 0);
}
MSL_CHECK __ubsan_handle_shift_out_of_bounds(OfTypes *at, u64, u64 amount) {
  fails(SHIFT, at->place, at->left, (int64_t)amount);
}
MSL_CHECK __ubsan_handle_missing_return(AtPlace *at) { fails(MISSING_RETURN, at->place, nullptr, 0); }
MSL_CHECK __ubsan_handle_builtin_unreachable(AtPlace *at) {
  fails(UNREACHABLE, at->place, nullptr, 0);
}
MSL_CHECK __ubsan_handle_float_cast_overflow(OfTypes *at, u64) {
  fails(FLOAT_TO_INTEGER, at->place, at->right, 0);
}
