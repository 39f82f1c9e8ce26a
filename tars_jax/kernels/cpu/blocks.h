// Neighbouring decoder blocks in one job: threads are woken once for all of them, and nothing but a counter stands between two products.
#pragma once
#include <vector>

#include "attention.h"
#include "product.h"

namespace tars {

// One block. Of the operands format, data, biases and updates are given.
struct Block {
  RunFloats attention_norm;
  Operand q, k, v;
  const float* q_norm;  // null: none
  const float* k_norm;
  bool rotates;
  LayerPages pages;
  Operand o;
  RunFloats mlp_norm;
  Operand gate, up, down;  // gate.data is null in models without one
};

struct Blocks {
  const void* x;  // [rows, width]
  void* out;
  DType type;
  int64_t rows, width;
  int64_t prompts_at;  // see `Product`
  float eps;
  Activation activation;
  Attention attention;  // all but queries and results
  RopeWrite write;      // slots and the rotation's table, in `q`
  std::vector<Block> blocks;
};

void run_blocks(Pool& pool, Blocks& blocks);

}  // namespace tars
