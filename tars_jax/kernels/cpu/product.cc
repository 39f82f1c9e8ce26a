#include "product.h"

#include <algorithm>

namespace tars {
namespace {

constexpr int64_t kRowBlockPanels = 16;  // 128 rows: their quantised panels stay in a 1 MiB second-level cache
constexpr int64_t kChunkBytes = 64 << 10;
constexpr int64_t kChunksPerThread = 6;
constexpr int64_t kManyRows = 64;  // above, waking costs nothing beside the work, and products had better share one cache-warm scratch
constexpr double kWakeSeconds = 3e-6, kBytesPerSecond = 14e9, kMacsPerSecond = 100e9;  // of one thread, roughly

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

class Runner {
 public:
  Runner(const Product& p, const Kernels& k) : p_(p), k_(k), panels_(ceil_div(p.rows, kPanel)) {
    for (const Operand& o : p.operands) {
      const bool pairs = o.format.dtype == DType::kBF16 && !o.format.quantized() && k.native_pairs();
      dots_.push_back(k.pick_dot(o.format, pairs));
      tiles_.push_back(o.format.tiles());
      want_groups_ |= o.format.quantized();
      want_pairs_ |= pairs;
      want_floats_ |= !o.format.quantized() && !pairs;
      bytes_ += o.format.tiles() * o.format.tile_bytes();
    }
    if (p.gated) tiles_.pop_back();
    for (int64_t t : tiles_) total_tiles_ += t;
    measure_panels();
  }

  int64_t bytes_of_panels() const { return panel_size_ * panels_; }
  void use_memory(char* memory) { memory_ = memory; }
  double seconds() const {  // of one thread, roughly
    const double macs = static_cast<double>(total_tiles_) * kLanes * p_.inputs * p_.rows;
    return std::max(bytes_ / kBytesPerSecond, macs / kMacsPerSecond);
  }

  // Tasks of two stages: the panels, then the tiles by chunks.
  int64_t panels() const { return panels_; }
  int64_t cut(int threads) {
    const int64_t tile_bytes = std::max<int64_t>(bytes_ / total_tiles_, 1);
    chunk_ = std::clamp(std::min(total_tiles_ / (threads * kChunksPerThread), kChunkBytes / tile_bytes), int64_t{1}, total_tiles_);
    chunks_ = ceil_div(total_tiles_, chunk_);
    return tasks_ = panels_ + ceil_div(panels_, kRowBlockPanels) * chunks_;
  }
  int64_t tasks() const { return tasks_; }
  void run(int64_t task) const {
    if (task < panels_) prepare(task);
    else multiply((task - panels_) / chunks_, (task - panels_) % chunks_);
  }

 private:
  void measure_panels() {
    groups_size_ = want_groups_ ? ceil_div(p_.inputs, kGroup) * kPanel * sizeof(ActivationGroup) : 0;
    floats_size_ = want_floats_ ? round_up(p_.inputs, 2) * kPanel * sizeof(float) : 0;
    pairs_size_ = want_pairs_ ? round_up(p_.inputs, 2) / 2 * kPanel * sizeof(uint32_t) : 0;
    panel_size_ = round_up(groups_size_ + floats_size_ + pairs_size_, 64);
  }

  PanelBuffers buffers(int64_t panel) const {
    char* at = memory_ + panel * panel_size_;
    return {want_groups_ ? reinterpret_cast<ActivationGroup*>(at) : nullptr,
            want_floats_ ? reinterpret_cast<float*>(at + groups_size_) : nullptr,
            want_pairs_ ? reinterpret_cast<uint32_t*>(at + groups_size_ + floats_size_) : nullptr};
  }

  int rows_in(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kPanel, p_.rows - panel * kPanel)); }

  void prepare(int64_t panel) const {
    static thread_local Scratch scratch;
    float* row = static_cast<float*>(scratch.get(round_up(p_.inputs, kGroup) * sizeof(float)));
    for (int r = 0; r < rows_in(panel); ++r) {
      const char* x = static_cast<const char*>(p_.x) + (panel * kPanel + r) * p_.inputs * size_of(p_.x_type);
      k_.read_row(x, p_.x_type, p_.inputs, p_.norm, p_.eps, row);
      k_.fill_panel(row, p_.inputs, r, buffers(panel));
    }
  }

  void multiply(int64_t row_block, int64_t chunk) const {
    int64_t tile = chunk * chunk_;
    const int64_t end = std::min(tile + chunk_, total_tiles_);
    size_t operand = 0;
    int64_t before = 0;
    for (; tile < end; ++tile) {
      while (tile - before >= tiles_[operand]) before += tiles_[operand++];
      multiply_tile(row_block, operand, tile - before);
    }
  }

  void multiply_tile(int64_t row_block, size_t operand, int64_t tile) const {
    alignas(64) float sums[kPanel * kLanes], other[kPanel * kLanes];
    const Operand& o = p_.operands[operand];
    const int64_t column = tile * kLanes, last = std::min(panels_, (row_block + 1) * kRowBlockPanels);
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, o.format.outputs - column));
    for (int64_t panel = row_block * kRowBlockPanels; panel < last; ++panel) {
      const PanelBuffers b = buffers(panel);
      const Panel x{b.groups, b.floats, b.pairs};
      const int rows = rows_in(panel);
      dots_[operand](o.data + tile * o.format.tile_bytes(), o.format.blocks(), x, rows, sums);
      if (p_.gated) {
        const Operand& up = p_.operands[1];
        dots_[1](up.data + tile * up.format.tile_bytes(), up.format.blocks(), x, rows, other);
      }
      k_.finish_tile(o.finish, sums, p_.gated ? other : nullptr, rows, lanes, panel * kPanel, column);
    }
  }

  const Product& p_;
  const Kernels& k_;
  const int64_t panels_;
  std::vector<Kernels::DotTile> dots_;
  std::vector<int64_t> tiles_;  // of each operand that has outputs of its own
  bool want_groups_ = false, want_floats_ = false, want_pairs_ = false;
  int64_t bytes_ = 0, total_tiles_ = 0, chunk_ = 1, chunks_ = 0, tasks_ = 0;
  int64_t groups_size_ = 0, floats_size_ = 0, pairs_size_ = 0, panel_size_ = 0;
  char* memory_ = nullptr;
};

}  // namespace

void run_products(Pool& pool, const std::vector<Product>& products) {
  if (products.size() > 1 && products[0].rows > kManyRows) {
    for (const Product& p : products) run_products(pool, {p});
    return;
  }
  std::vector<Runner> runners;
  double seconds = 0.0;
  int64_t bytes = 0;
  for (const Product& p : products) {
    if (!p.rows) return;
    runners.emplace_back(p, kernels());
    seconds += runners.back().seconds();
    bytes += runners.back().bytes_of_panels();
  }
  static thread_local Scratch scratch;
  char* memory = static_cast<char*>(scratch.get(bytes));
  const int threads = seconds > kWakeSeconds ? pool.threads() : 1;
  Barriers barriers;
  int64_t tasks = 0;
  for (Runner& r : runners) {
    r.use_memory(memory);
    memory += r.bytes_of_panels();
    if (tasks) barriers.add(tasks);
    barriers.add(tasks + r.panels());
    tasks += r.cut(threads);
  }
  parallel(pool, threads, tasks, barriers, [&](int64_t task) {
    size_t i = 0;
    for (; task >= runners[i].tasks(); ++i) task -= runners[i].tasks();
    runners[i].run(task);
  });
}

}  // namespace tars
