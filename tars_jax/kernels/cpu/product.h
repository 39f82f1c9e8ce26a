// Activations times packed weights.
#pragma once
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace tars {

struct Operand {
  Format format;
  const uint8_t* data;
  Finish finish;
};

struct Product {
  const void* x;  // [rows, inputs]
  DType x_type;
  int64_t rows, inputs;
  const float* norm;  // null: no normalisation
  float eps;
  std::vector<Operand> operands;
  bool gated;  // two operands: the second multiplies the first's activated result
};

// Products one after the other, each on the results of those before it. In one job: threads are woken once.
void run_products(Pool& pool, const std::vector<Product>& products);

}  // namespace tars
