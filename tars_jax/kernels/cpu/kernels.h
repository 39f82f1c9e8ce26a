// The table of inner loops one instruction set provides, and the choice among them.
#pragma once
#include <limits>

#include "format.h"

namespace tars {

struct PanelBuffers {  // where a panel's rows are written; null for the forms no weight wants
  ActivationGroup* groups;
  ActivationTile* tiles;
  float* floats;
  uint32_t* pairs;
};

// The tiles that are wanted next. Each of `turns` products of those before them fetches its part of their blocks: all at once they would be
// more than memory gives in that time.
struct Ahead {
  const uint8_t* tiles[2];
  int64_t block_bytes;
  int64_t turn, turns;
};

// Numbers that rows share: those of rows [0, rows) first, then those of the next run of so many rows, each run's `size` long.
struct RunFloats {
  const float* data = nullptr;  // null: none
  int64_t rows = 0, size = 0;
  const float* of(int64_t row) const { return data ? data + row / rows * size : nullptr; }
  int64_t left(int64_t row) const { return data ? rows - row % rows : std::numeric_limits<int64_t>::max() / 2; }  // of the run, from this row on
};

// A low-rank update of a matrix, `a.T @ diag(scale) @ b`.
struct LowRank {
  int64_t ranks;
  RunFloats a, b;      // [ranks, outputs], [ranks, inputs]
  const float* scale;  // of (row, rank) at row * scale_row + rank * scale_rank
  int64_t scale_row, scale_rank;
};

struct Finish {  // what happens to a tile's sums before they are stored
  Activation activation;
  RunFloats bias, other_bias;
  const void* residual;
  DType residual_type;
  void* out;
  DType out_type;
  int64_t outputs;  // columns of `out` and `residual`
  bool pairs = false;  // `out` is panels of the next product, in the form of pairs (AMX), its row 0 the first one's
};

constexpr int kQueryRows = 32;    // (query, head) pairs of an attention task: two vectors of lanes
constexpr int kSegment = 128;     // cached tokens per softmax; segments start at multiples of it, wherever a query or its window does
constexpr int64_t kMaxHeadDim = 1024;
constexpr int kChunkTokens = 32;  // cached tokens widened at once

// Attention of queries [first, first + count) of one row, heads [head, head + group), to cached tokens [begin, end) of one KV head.
struct AttentionTask {
  const void* q;  // [T, heads, head_dim]
  DType q_type;
  const void* k_pages;  // [N, kv_heads, page, head_dim], 8-bit ones with a scale before each vector
  const void* v_pages;
  DType cache_type;
  const int32_t* table;  // the row's pages
  int64_t heads, kv_heads, head_dim, page;
  int64_t page_shift;  // log2(page), or -1: a division per cached token would cost as much as its arithmetic
  int64_t kv_head, head, group;
  int64_t first, count;
  int64_t position;  // of query `first`
  int64_t begin, end;
  int64_t window;
  float scale, softcap;
  void* out;       // [T, heads, head_dim] of q_type
  float* partial;  // of a single query, whose task is one segment: per head of the group: maximum, total, head_dim values
  bool whole;      // that segment is all there is
  const AttentionTask* next = nullptr;  // what this thread will probably do next: a single query fetches that one's keys and values
};

struct RotateTask {
  const void* in;  // [T, heads, head_dim]
  DType type;
  int64_t heads, head_dim, half;  // half: rotated pairs per head; 0: no rotation
  const float* cos;               // [T, half]
  const float* sin;
  const float* norm;  // [head_dim], or null
  float eps;
};

struct Kernels {
  const char* name;
  int panel;  // rows of a panel
  int panels_together;  // that a tile meets one after the other: as many as the second-level cache holds
  bool fills_pairs;  // whether `finish_tile` knows `Finish::pairs`
  bool (*native_pairs)();  // whether bfloat16 pairs have an instruction
  // The product of a panel's rows and `blocks` blocks of one tile, or of two tiles of one format; `out` gets [rows][16] of each. Where `first`
  // others come before those, `out` has what these gave, and the rest is added.
  using DotTiles = void (*)(const uint8_t* const* tiles, int64_t first, int64_t blocks, const Ahead& ahead, const Panel& panel, int rows, float* const* out);
  using UnpackTile = void (*)(const uint8_t* tile, int64_t blocks, uint8_t* out);
  struct Dot {
    Form form;          // of the activations
    DotTiles one, two;  // two: null where it gains nothing
    UnpackTile unpack = nullptr;  // how tiles come into the form these take, with an even number of blocks; null: they have it
    int64_t block_bytes = 0;      // of that form
    int shapes = 0;               // what `set_shapes` wants to know before
    int64_t stretch = 0;          // inputs, about, that are multiplied for all panels before the next ones; 0: all, and `first` is 0
  };
  Dot (*pick_dot)(const Format& w, int64_t rows, bool prompts);  // prompts: see `Product`
  void (*set_shapes)(int shapes);  // of this thread's registers, where they have any; 0: done with them
  void (*read_row)(const void* x, DType type, int64_t inputs, const float* norm, float eps, float* out);
  void (*fill_panel)(const float* x, int64_t inputs, int row, const PanelBuffers& out);
  // For a row's `inputs` numbers what an update makes of them before `a`: [ranks].
  void (*project)(const LowRank& update, const float* x, int64_t inputs, int64_t row, float* out);
  // Adds to a tile's sums what `a` makes of that; of row r of the panel it stands at r * step.
  void (*add_update)(const LowRank& update, const float* projected, int64_t step, int rows, int lanes, int64_t row, int64_t column, float* sums);
  void (*finish_tile)(const Finish& f, const float* sums, const float* other, int rows, int lanes, int64_t row, int64_t column);
  void (*attend)(const AttentionTask& task, float* scratch);  // attention_scratch(head_dim) floats
  void (*merge)(const AttentionTask& task, int64_t segments);  // of the first segment's task; the others' partials follow
  void (*rotate)(const RotateTask& task, int64_t token, int64_t head, void* out, DType out_type);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null when this build or processor has none
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

const Kernels& kernels();  // the best of them, or what TARS_CPU_ISA forces
bool use_kernels(const char* name);  // others from now on; false if they do not exist here

// Floats of scratch an AttentionTask needs, whichever way it goes: scores; keys or values; queries, two results, some numbers a lane.
inline int64_t attention_scratch(int64_t head_dim) { return 128 * (ceil_div(head_dim, 32) * 32) + 6400; }
inline int64_t partial_floats(int64_t head_dim) { return head_dim + 2; }

}  // namespace tars
