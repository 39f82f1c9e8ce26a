// The table of this translation unit's instruction set.
#pragma once
#include "attend.h"
#include "dot.h"
#include "rotate.h"
#include "rows.h"

namespace tars::TARS_ISA {

static bool native_pairs() {
#if defined(__AVX512F__)
  return has_pairs();
#else
  return false;
#endif
}

static const Kernels table = {TARS_ISA_NAME, native_pairs, pick_dot, read_row, fill_panel, project, add_update, finish_tile, attend, merge, rotate};

}  // namespace tars::TARS_ISA
