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
  // Rows from here on belong to prompts. An instruction set may have another arithmetic for these; what a row becomes then depends on what it
  // is, and never on how many there are.
  int64_t prompts_at;
};

// One product as stages of a job: the rows as panels, then the tiles in chunks. Lives as long as the job.
class ProductRunner {
 public:
  explicit ProductRunner(Product product);
  int64_t bytes_of_panels() const;
  bool takes_panels() const;   // whether its rows may come as panels
  void take_panels(char* panels);  // those it is to read instead of x
  bool worth_sharing() const;  // whether a thread should be woken for it
  void add_to(Stages& stages, int threads, char* memory);  // memory: for the panels; the next product may use it too

 private:
  class Part;
  class Shapes;
  double seconds() const;  // of one thread, roughly
  void cut(int threads);
  bool fetch(int64_t chunk, int64_t piece) const;

  const Product p_;
  const Kernels& k_;
  std::vector<Part> parts_;
  std::vector<int64_t> chunks_;  // where each begins, and where the last ends: tiles
  int64_t bytes_ = 0, total_tiles_ = 0;
};

// Rows of one kind.
class ProductRunner::Part {
 public:
  Part(const Product& p, const Kernels& k, int64_t first, int64_t rows, std::vector<Kernels::Dot> dots);
  int64_t bytes_of_panels() const { return filled_ ? 0 : panel_size_ * panels_; }
  int64_t panels() const { return panels_; }
  void use(char* memory) { memory_ = filled_ ? memory_ : memory; }
  bool takes_panels() const;
  void take_panels(char* panels) { filled_ = true, memory_ = panels; }
  int64_t preparations() const { return filled_ ? 0 : ceil_div(rows_, rows_at_once()); }
  void prepare(int64_t preparation) const;
  int64_t row_blocks() const;
  void multiply(int64_t row_block, int64_t begin, int64_t end) const;  // with tiles [begin, end)

 private:
  int64_t rows_at_once() const;
  PanelBuffers buffers(int64_t panel) const;
  int rows_in(int64_t panel) const;
  struct Tiles;
  int64_t stretch(const Tiles& tiles) const;
  void unpack(const Tiles& tiles, int64_t begin, int64_t end, const uint8_t* (&parts)[2]) const;
  void multiply_tiles(int64_t row_block, const Tiles& tiles, Shapes& shapes) const;
  void finish(const Tiles& tiles, int64_t panel, float* sums, float* others) const;
  float* projected(int64_t panel) const;
  void update(size_t operand, int64_t panel, int64_t tile, float* sums) const;

  const Product& p_;
  const Kernels& k_;
  const int64_t first_, rows_, panels_;
  const std::vector<Kernels::Dot> dots_;  // of each operand
  bool unpacks_ = false;
  bool twins_ = false;  // gate and up are of one format
  int64_t ranks_ = 0;  // of all operands' updates
  int64_t forms_[kForms] = {}, projected_ = 0, panel_size_ = 0;  // bytes of a panel's forms, where its projections begin, and all in all
  char* memory_ = nullptr;
  bool filled_ = false;  // by the product before
};

void run_product(Pool& pool, Product product);

}  // namespace tars
