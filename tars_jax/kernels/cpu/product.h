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
  std::vector<LowRank> updates;

  int64_t ranks() const;  // of all updates
};

struct Product {
  const void* x;  // [rows, inputs]
  DType x_type;
  int64_t rows, inputs;
  RunFloats norm;
  float eps;
  std::vector<Operand> operands;
  bool gated;  // two operands: the second multiplies the first's activated result
};

// One product as stages of a job: the rows as panels, then the tiles in chunks. Lives as long as the job.
class ProductRunner {
 public:
  explicit ProductRunner(Product product);
  int64_t bytes_of_panels() const { return panel_size_ * panels_; }
  bool worth_sharing() const;  // whether a thread should be woken for it
  void add_to(Stages& stages, int threads, char* memory);  // memory: for the panels; the next product may use it too

 private:
  double seconds() const;  // of one thread, roughly
  void cut(int threads);
  PanelBuffers buffers(int64_t panel) const;
  int rows_in(int64_t panel) const;
  void prepare(int64_t begin, int64_t end) const;
  bool fetch(int64_t chunk, int64_t piece) const;
  void multiply(int64_t row_block, int64_t chunk) const;
  class Shapes;
  void unpack(size_t operand, bool both, const uint8_t* (&tiles)[2]) const;
  void multiply_tiles(int64_t row_block, size_t operand, int64_t tile, int64_t count, Shapes& shapes) const;
  float* projected(int64_t panel) const;
  void update(size_t operand, int64_t panel, int64_t tile, float* sums) const;

  const Product p_;
  const Kernels& k_;
  const int64_t panels_;
  std::vector<Kernels::Dot> dots_;
  std::vector<int64_t> chunks_;  // where each begins, and where the last ends: tiles
  bool want_groups_ = false, want_tiles_ = false, want_floats_ = false, want_pairs_ = false;
  bool twins_ = false;  // gate and up are of one format
  int64_t bytes_ = 0, total_tiles_ = 0;
  int64_t ranks_ = 0;  // of all operands' updates
  int64_t groups_size_ = 0, tiles_size_ = 0, floats_size_ = 0, pairs_size_ = 0, panel_size_ = 0;
  char* memory_ = nullptr;
};

void run_product(Pool& pool, Product product);

}  // namespace tars
