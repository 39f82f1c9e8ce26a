#include "product.h"

#include <algorithm>

namespace tars {
namespace {

constexpr int64_t kPanelsTogether = 16;  // 128 rows: they stay in a 1 MiB second-level cache, and 256 rows of AMX in its 2 MiB
constexpr int64_t kLeastChunkBytes = 8 << 10;
constexpr double kShareOfRound = 0.9;  // of the tiles that are left
constexpr int64_t kFetchBytes = 1 << 10;  // at a time, of an operand
constexpr int64_t kPairingRows = 3;  // from here on two tiles of an operand are multiplied at once: fewer rows want one long stream of memory
constexpr int64_t kFewRows = 64, kRowsPerTask = 2;  // few rows are prepared two at a time, so that all threads have some
constexpr double kWakeSeconds = 3e-6, kBytesPerSecond = 14e9, kMacsPerSecond = 100e9;  // of one thread, roughly

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
int lanes_in(const Format& f, int64_t tile) { return static_cast<int>(std::min<int64_t>(kLanes, f.outputs - tile * kLanes)); }

}  // namespace

int64_t Operand::ranks() const {
  int64_t total = 0;
  for (const LowRank& update : updates) total += update.ranks;
  return total;
}

ProductRunner::ProductRunner(Product p) : p_(std::move(p)), k_(kernels()), panels_(ceil_div(p_.rows, k_.panel)) {
  for (const Operand& o : p_.operands) {
    const bool pairs = o.format.dtype == DType::kBF16 && !o.format.quantized() && k_.native_pairs();
    dots_.push_back(k_.pick_dot(o.format, pairs, p_.rows));
    want_groups_ |= o.format.quantized() && !dots_.back().unpack;
    want_tiles_ |= dots_.back().unpack != nullptr;
    want_pairs_ |= pairs;
    want_floats_ |= !o.format.quantized() && !pairs;
    bytes_ += o.format.tiles() * o.format.tile_bytes();
    ranks_ += o.ranks();
    if (!p_.gated || dots_.size() == 1) total_tiles_ += o.format.tiles();
  }
  twins_ = p_.gated && dots_[0].two && dots_[0].two == dots_[1].two && p_.operands[0].format.tile_bytes() == p_.operands[1].format.tile_bytes();
  groups_size_ = want_groups_ ? ceil_div(p_.inputs, kGroup) * k_.panel * sizeof(ActivationGroup) : 0;
  tiles_size_ = want_tiles_ ? round_up(ceil_div(p_.inputs, kGroup), 2) * sizeof(ActivationTile) : 0;
  floats_size_ = want_floats_ ? round_up(p_.inputs, 2) * k_.panel * sizeof(float) : 0;
  pairs_size_ = want_pairs_ ? round_up(p_.inputs, kGroup) / 2 * k_.panel * sizeof(uint32_t) : 0;
  panel_size_ = round_up(groups_size_ + tiles_size_ + floats_size_ + pairs_size_ + ranks_ * k_.panel * sizeof(float), 64);
}

double ProductRunner::seconds() const {
  const double macs = static_cast<double>(total_tiles_) * kLanes * p_.inputs * p_.rows;
  return std::max(bytes_ / kBytesPerSecond, macs / kMacsPerSecond);
}

bool ProductRunner::worth_sharing() const { return seconds() > kWakeSeconds; }

void ProductRunner::add_to(Stages& stages, int threads, char* memory) {
  memory_ = memory;
  cut(threads);
  const int64_t chunks = static_cast<int64_t>(chunks_.size()) - 1;
  const int64_t rows = p_.rows > kFewRows ? k_.panel : kRowsPerTask;
  stages.add(ceil_div(p_.rows, rows), [this, rows](int64_t task) { prepare(task * rows, std::min((task + 1) * rows, p_.rows)); });
  stages.add(ceil_div(panels_, kPanelsTogether) * chunks, [this](int64_t task) {
    const int64_t chunks = static_cast<int64_t>(chunks_.size()) - 1;
    multiply(task / chunks, task % chunks);
  }, panels_ == 1 ? [this](int64_t chunk, int64_t piece) { return fetch(chunk, piece); } : Stages::Fetch());
}

// Of few rows memory sets the pace: it had better not pause while a thread waits for the panel.
bool ProductRunner::fetch(int64_t chunk, int64_t piece) const {
  int64_t before = 0, at = piece * kFetchBytes;
  bool found = false;
  for (const Operand& o : p_.operands) {
    const int64_t begin = std::max(chunks_[chunk] - before, int64_t{0}), end = std::min(chunks_[chunk + 1] - before, o.format.tiles());
    const int64_t bytes = std::max(end - begin, int64_t{0}) * o.format.tile_bytes();
    for (int64_t line = at; line < std::min(at + kFetchBytes, bytes); line += 64, found = true)
      __builtin_prefetch(o.data + begin * o.format.tile_bytes() + line);
    if (p_.gated) continue;  // both operands' tiles are read side by side, the others' one after the other
    if (found) return true;
    before += o.format.tiles();
    at -= ceil_div(bytes, kFetchBytes) * kFetchBytes;
  }
  return found;
}

// Rounds of one run of tiles for each thread, ever shorter, so that all end at about the same time: most of a product in the first, for a
// processor's own prefetcher wants long runs. Of even length, for two tiles are multiplied at once.
void ProductRunner::cut(int threads) {
  const int64_t tile_bytes = std::max<int64_t>(bytes_ / std::max<int64_t>(total_tiles_, 1), 1);
  const int64_t least = round_up(std::max<int64_t>(kLeastChunkBytes / tile_bytes, 1), 2);
  for (int64_t at = 0; at < total_tiles_;) {
    const int64_t fair = static_cast<int64_t>(kShareOfRound * static_cast<double>(total_tiles_ - at)) / threads;
    const int64_t size = round_up(std::max(fair, least), 2);
    for (int i = 0; i < threads && at < total_tiles_; ++i, at += size) chunks_.push_back(at);
  }
  chunks_.push_back(total_tiles_);
}

PanelBuffers ProductRunner::buffers(int64_t panel) const {
  char* at = memory_ + panel * panel_size_;
  const auto take = [&at](auto* type, bool wanted, int64_t size) {
    auto* taken = reinterpret_cast<decltype(type)>(wanted ? at : nullptr);
    at += size;
    return taken;
  };
  PanelBuffers b;
  b.tiles = take(b.tiles, want_tiles_, tiles_size_);
  b.groups = take(b.groups, want_groups_, groups_size_);
  b.floats = take(b.floats, want_floats_, floats_size_);
  b.pairs = take(b.pairs, want_pairs_, pairs_size_);
  return b;
}

// What the updates' `b` make of a panel's rows: [panel][ranks_], one operand's after the other's.
float* ProductRunner::projected(int64_t panel) const {
  return reinterpret_cast<float*>(memory_ + panel * panel_size_ + tiles_size_ + groups_size_ + floats_size_ + pairs_size_);
}

int ProductRunner::rows_in(int64_t panel) const { return static_cast<int>(std::min<int64_t>(k_.panel, p_.rows - panel * k_.panel)); }

void ProductRunner::prepare(int64_t begin, int64_t end) const {
  static thread_local Scratch scratch;
  float* row = static_cast<float*>(scratch.get(round_up(p_.inputs, kGroup) * sizeof(float)));
  for (int64_t r = begin; r < end; ++r) {
    k_.read_row(static_cast<const char*>(p_.x) + r * p_.inputs * size_of(p_.x_type), p_.x_type, p_.inputs, p_.norm.of(r), p_.eps, row);
    k_.fill_panel(row, p_.inputs, static_cast<int>(r % k_.panel), buffers(r / k_.panel));
    float* out = projected(r / k_.panel) + r % k_.panel * ranks_;
    for (const Operand& o : p_.operands)
      for (const LowRank& update : o.updates) {
        k_.project(update, row, p_.inputs, r, out);
        out += update.ranks;
      }
  }
}

void ProductRunner::update(size_t operand, int64_t panel, int64_t tile, float* sums) const {
  const float* from = projected(panel);
  for (size_t before = 0; before < operand; ++before) from += p_.operands[before].ranks();
  const Operand& o = p_.operands[operand];
  for (const LowRank& update : o.updates) {
    k_.add_update(update, from, ranks_, rows_in(panel), lanes_in(o.format, tile), panel * k_.panel, tile * kLanes, sums);
    from += update.ranks;
  }
}

// The shapes that a thread's registers have, while it multiplies.
class ProductRunner::Shapes {
 public:
  explicit Shapes(const Kernels& k) : k_(k) {}
  ~Shapes() { set(0); }
  void set(int shapes) {
    if (shapes != now_) k_.set_shapes(now_ = shapes);
  }

 private:
  const Kernels& k_;
  int now_ = 0;
};

void ProductRunner::multiply(int64_t row_block, int64_t chunk) const {
  Shapes shapes(k_);
  size_t operand = 0;
  int64_t before = 0;
  for (int64_t tile = chunks_[chunk], count; tile < chunks_[chunk + 1]; tile += count) {
    while (tile - before >= p_.operands[operand].format.tiles()) before += p_.operands[operand++].format.tiles();
    const int64_t left = std::min(chunks_[chunk + 1], before + p_.operands[operand].format.tiles()) - tile;
    count = !p_.gated && p_.rows >= kPairingRows && dots_[operand].two && left >= 2 ? 2 : 1;
    multiply_tiles(row_block, operand, tile - before, count, shapes);
  }
}

// Brings one or two tiles into the form they are multiplied in, once for all panels; they stay valid until the next call of this thread.
void ProductRunner::unpack(size_t operand, bool both, const uint8_t* (&tiles)[2]) const {
  if (!want_tiles_) return;
  const size_t other = p_.gated ? 1 : operand;
  static thread_local Scratch scratch;
  const Kernels::Dot* const dots[2] = {&dots_[operand], &dots_[other]};
  const Format* const formats[2] = {&p_.operands[operand].format, &p_.operands[other].format};
  size_t bytes[2];
  for (int i = 0; i < 2; ++i) bytes[i] = dots[i]->block_bytes * round_up(formats[i]->blocks(), 2);
  uint8_t* at = static_cast<uint8_t*>(scratch.get(bytes[0] + bytes[1]));
  for (int i = 0; i <= both; at += bytes[i++]) {
    if (!dots[i]->unpack) continue;
    dots[i]->unpack(tiles[i], formats[i]->blocks(), at);
    tiles[i] = at;
  }
}

// One or two tiles of an operand; of a gated product one, and the other operand's.
void ProductRunner::multiply_tiles(int64_t row_block, size_t operand, int64_t tile, int64_t count, Shapes& shapes) const {
  alignas(64) float sums[2][kMostPanel * kLanes];
  float* const out[2] = {sums[0], sums[1]};
  const Operand &o = p_.operands[operand], &second = p_.operands[p_.gated ? 1 : operand];
  const int64_t last = std::min(panels_, (row_block + 1) * kPanelsTogether);
  const int64_t next = p_.gated ? tile : tile + 1;
  const bool pair = count == 2 || (p_.gated && twins_);
  const uint8_t* const packed[2] = {o.data + tile * o.format.tile_bytes(), second.data + next * second.format.tile_bytes()};
  const uint8_t* tiles[2] = {packed[0], packed[1]};
  unpack(operand, pair || p_.gated, tiles);
  const int64_t first = row_block * kPanelsTogether;
  for (int64_t panel = first; panel < last; ++panel) {
    const PanelBuffers b = buffers(panel);
    const Panel x{b.groups, b.tiles, b.floats, b.pairs};
    const int rows = rows_in(panel);
    const auto finish = [&](int64_t at, float* found, const float* other) {
      update(operand, panel, at, found);
      k_.finish_tile(o.finish, found, other, rows, lanes_in(o.format, at), panel * k_.panel, at * kLanes);
    };
    const uint8_t* const ahead[2] = {packed[0] + count * o.format.tile_bytes(), packed[1] + count * second.format.tile_bytes()};
    const int64_t turn = panel - first, turns = last - first;
    shapes.set(dots_[operand].shapes);
    (pair ? dots_[operand].two : dots_[operand].one)(tiles, o.format.blocks(), {{ahead[0], ahead[1]}, o.format.block_bytes(), turn, turns}, x, rows, out);
    if (p_.gated && !pair) {
      shapes.set(dots_[1].shapes);
      dots_[1].one(tiles + 1, second.format.blocks(), {{ahead[1]}, second.format.block_bytes(), turn, turns}, x, rows, out + 1);
    }
    if (p_.gated) update(1, panel, tile, sums[1]);
    finish(tile, sums[0], p_.gated ? sums[1] : nullptr);
    if (count == 2) finish(tile + 1, sums[1], nullptr);
  }
}

void run_product(Pool& pool, Product product) {
  if (!product.rows) return;
  static thread_local Scratch scratch;
  ProductRunner runner(std::move(product));
  Stages stages;
  const int threads = runner.worth_sharing() ? pool.threads() : 1;
  runner.add_to(stages, threads, static_cast<char*>(scratch.get(runner.bytes_of_panels())));
  run_stages(pool, threads, std::move(stages));
}

}  // namespace tars
