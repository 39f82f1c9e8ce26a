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

void run_product(Pool& pool, const Product& product);

}  // namespace tars
