// Where the compiled kernel lies in memory.
#pragma once
#include "fibers.h"
#include <link.h>

static u64 image_base, image_from, image_to;

static bool in_image(u64 address) { return address - image_from < image_to - image_from; }

static int if_it_holds_the_entry(struct dl_phdr_info *info, size_t, void *) {
  u64 from = ~0ull, to = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto &part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    u64 start = info->dlpi_addr + part.p_vaddr;
    if (start < from) from = start;
    if (start + part.p_memsz > to) to = start + part.p_memsz;
  }
  u64 entry = (u64)launch->entry;
  if (entry < from || entry >= to) return 0;
  image_base = info->dlpi_addr;
  image_from = from;
  image_to = to;
  return 1;
}

static void find_image() { dl_iterate_phdr(if_it_holds_the_entry, nullptr); }
