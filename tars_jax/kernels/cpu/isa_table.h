// The table of this translation unit's instruction set.
#pragma once
#include "attend.h"
#include "dot.h"
#if defined(__AMX_TILE__)
#include "dot_amx.h"
#endif
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

#if defined(__AMX_TILE__)
constexpr int kPanelsTogether = 32;  // 512 rows in 2 MiB
constexpr bool kFillsPairs = true;
constexpr auto kPickDot = pick_tiles;
constexpr auto kSetShapes = set_tile_shapes;
#else
constexpr int kPanelsTogether = 16;  // 128 rows in 1 MiB
constexpr bool kFillsPairs = false;
constexpr auto kPickDot = pick_dot;
static void no_shapes(int) {}
constexpr auto kSetShapes = no_shapes;
#endif

static const Kernels table = {TARS_ISA_NAME, kPanel, kPanelsTogether, kFillsPairs, native_pairs, kPickDot, kSetShapes, read_row, fill_panel, project, add_update, finish_tile, attend, merge, rotate};

}  // namespace tars::TARS_ISA
