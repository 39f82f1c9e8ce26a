#include "product.h"

#include <algorithm>

namespace tars {
namespace {

constexpr int64_t kLeastChunkBytes = 8 << 10;
constexpr double kShareOfRound = 0.9, kShareOfMany = 0.6;  // of the tiles that are left, with few rows or many
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

ProductRunner::ProductRunner(Product p) : p_(std::move(p)), k_(kernels()) {
  const int64_t others = p_.prompts_at;
  std::vector<Kernels::Dot> dots[2];
  bool same = true;
  for (const Operand& o : p_.operands) {
    dots[0].push_back(k_.pick_dot(o.format, others, false));
    dots[1].push_back(k_.pick_dot(o.format, p_.rows - others, true));
    same = same && dots[0].back().form == dots[1].back().form;
    bytes_ += o.format.tiles() * o.format.tile_bytes();
    if (!p_.gated || dots[0].size() == 1) total_tiles_ += o.format.tiles();
  }
  const int64_t ends[2] = {same ? p_.rows : others, p_.rows};
  for (int64_t i = 0, first = 0; i < 2; first = ends[i++])
    if (first < ends[i]) parts_.emplace_back(p_, k_, first, ends[i] - first, std::move(dots[i]));
}

double ProductRunner::seconds() const {
  const double macs = static_cast<double>(total_tiles_) * kLanes * p_.inputs * p_.rows;
  return std::max(bytes_ / kBytesPerSecond, macs / kMacsPerSecond);
}

bool ProductRunner::worth_sharing() const { return seconds() > kWakeSeconds; }

int64_t ProductRunner::bytes_of_panels() const {
  int64_t total = 0;
  for (const Part& part : parts_) total += part.bytes_of_panels();
  return total;
}

bool ProductRunner::takes_panels() const { return k_.fills_pairs && parts_.size() == 1 && parts_[0].takes_panels(); }
void ProductRunner::take_panels(char* panels) { parts_[0].take_panels(panels); }

void ProductRunner::add_to(Stages& stages, int threads, char* memory) {
  cut(threads);
  int64_t preparations = 0, row_blocks = 0, panels = 0;
  for (Part& part : parts_) {
    part.use(memory);
    memory += part.bytes_of_panels();
    preparations += part.preparations();
    row_blocks += part.row_blocks();
    panels += part.panels();
  }
  stages.add(preparations, [this](int64_t task) {
    for (const Part& part : parts_) {
      if (task < part.preparations()) return part.prepare(task);
      task -= part.preparations();
    }
  });
  const int64_t chunks = static_cast<int64_t>(chunks_.size()) - 1;
  stages.add(row_blocks * chunks, [this, chunks](int64_t task) {
    for (const Part& part : parts_) {
      const int64_t block = task / chunks, chunk = task % chunks;
      if (block < part.row_blocks()) return part.multiply(block, chunks_[chunk], chunks_[chunk + 1]);
      task -= part.row_blocks() * chunks;
    }
  }, panels == 1 ? [this](int64_t chunk, int64_t piece) { return fetch(chunk, piece); } : Stages::Fetch());
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

// Rounds of one run of tiles for each thread, ever shorter, so that all end at about the same time. Of few rows most of a product is in the
// first, for a processor's own prefetcher wants long runs. Of even length, for two tiles are multiplied at once.
void ProductRunner::cut(int threads) {
  const int64_t tile_bytes = std::max<int64_t>(bytes_ / std::max<int64_t>(total_tiles_, 1), 1);
  const bool many = p_.rows > kFewRows;
  const int64_t least = round_up(many ? 1 : std::max<int64_t>(kLeastChunkBytes / tile_bytes, 1), 2);
  for (int64_t at = 0; at < total_tiles_;) {
    const int64_t fair = static_cast<int64_t>((many ? kShareOfMany : kShareOfRound) * static_cast<double>(total_tiles_ - at)) / threads;
    const int64_t size = round_up(std::max(fair, least), 2);
    for (int i = 0; i < threads && at < total_tiles_; ++i, at += size) chunks_.push_back(at);
  }
  chunks_.push_back(total_tiles_);
}

ProductRunner::Part::Part(const Product& p, const Kernels& k, int64_t first, int64_t rows, std::vector<Kernels::Dot> dots)
    : p_(p), k_(k), first_(first), rows_(rows), panels_(ceil_div(rows, k.panel)), dots_(std::move(dots)) {
  const int64_t groups = ceil_div(p_.inputs, kGroup);
  const auto bytes = [&](Form form) -> int64_t {
    switch (form) {
      case Form::kGroups: return groups * k_.panel * sizeof(ActivationGroup);
      case Form::kTiles: return round_up(groups, 2) * sizeof(ActivationTile);
      case Form::kPairs: return groups * kGroup * k_.panel * 2;
      default: return round_up(p_.inputs, 2) * k_.panel * 4;
    }
  };
  for (const Kernels::Dot& dot : dots_) {
    forms_[static_cast<int>(dot.form)] = bytes(dot.form);
    unpacks_ |= dot.unpack != nullptr;
  }
  for (const Operand& o : p_.operands) ranks_ += o.ranks();
  for (const int64_t bytes : forms_) projected_ += bytes;
  panel_size_ = round_up(projected_ + ranks_ * k_.panel * 4, 64);
  twins_ = p_.gated && dots_[0].two && dots_[0].two == dots_[1].two && p_.operands[0].format.tile_bytes() == p_.operands[1].format.tile_bytes();
}

bool ProductRunner::Part::takes_panels() const {
  return projected_ == forms_[static_cast<int>(Form::kPairs)] && !ranks_ && !p_.norm.data && p_.inputs % kGroup == 0;
}

int64_t ProductRunner::Part::rows_at_once() const { return rows_ > kFewRows ? k_.panel : kRowsPerTask; }
int64_t ProductRunner::Part::row_blocks() const { return ceil_div(panels_, k_.panels_together); }

PanelBuffers ProductRunner::Part::buffers(int64_t panel) const {
  char* at = memory_ + panel * panel_size_;
  const auto take = [&](auto*& place, Form form) {
    const int64_t bytes = forms_[static_cast<int>(form)];
    if (bytes) place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(at);
    at += bytes;
  };
  PanelBuffers b{};
  take(b.tiles, Form::kTiles);  // the first: AMX and its rows of 64 bytes
  take(b.pairs, Form::kPairs);
  take(b.groups, Form::kGroups);
  take(b.floats, Form::kFloats);
  return b;
}
// What the updates' `b` make of a panel's rows: [panel][ranks_], one operand's after the other's.
float* ProductRunner::Part::projected(int64_t panel) const {
  return reinterpret_cast<float*>(memory_ + panel * panel_size_ + projected_);
}

int ProductRunner::Part::rows_in(int64_t panel) const { return static_cast<int>(std::min<int64_t>(k_.panel, rows_ - panel * k_.panel)); }

void ProductRunner::Part::prepare(int64_t preparation) const {
  static thread_local Scratch scratch;
  float* row = static_cast<float*>(scratch.get(round_up(p_.inputs, kGroup) * sizeof(float)));
  for (int64_t i = preparation * rows_at_once(), end = std::min(i + rows_at_once(), rows_); i < end; ++i) {
    const int64_t r = first_ + i;
    k_.read_row(static_cast<const char*>(p_.x) + r * p_.inputs * size_of(p_.x_type), p_.x_type, p_.inputs, p_.norm.of(r), p_.eps, row);
    k_.fill_panel(row, p_.inputs, static_cast<int>(i % k_.panel), buffers(i / k_.panel));
    float* out = projected(i / k_.panel) + i % k_.panel * ranks_;
    for (const Operand& o : p_.operands)
      for (const LowRank& update : o.updates) {
        k_.project(update, row, p_.inputs, r, out);
        out += update.ranks;
      }
  }
}

void ProductRunner::Part::update(size_t operand, int64_t panel, int64_t tile, float* sums) const {
  const float* from = projected(panel);
  for (size_t before = 0; before < operand; ++before) from += p_.operands[before].ranks();
  const Operand& o = p_.operands[operand];
  for (const LowRank& update : o.updates) {
    k_.add_update(update, from, ranks_, rows_in(panel), lanes_in(o.format, tile), first_ + panel * k_.panel, tile * kLanes, sums);
    from += update.ranks;
  }
}

// What is multiplied at once: one tile or two of an operand; of a gated product one, and the other operand's.
struct ProductRunner::Part::Tiles {
  struct Side {
    const Operand& operand;
    const Kernels::Dot& dot;
    int64_t tile;

    const uint8_t* packed() const { return operand.data + tile * operand.format.tile_bytes(); }
    int64_t blocks(int64_t inputs) const { return ceil_div(inputs, operand.format.quantized() ? kGroup : 2); }
  };
  Side sides[2];
  size_t operand;
  int64_t count;  // of the operand's tiles
  bool both;  // in one call
};

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

void ProductRunner::Part::multiply(int64_t row_block, int64_t begin, int64_t end) const {
  Shapes shapes(k_);
  size_t operand = 0;
  int64_t before = 0;
  for (int64_t tile = begin, count; tile < end; tile += count) {
    while (tile - before >= p_.operands[operand].format.tiles()) before += p_.operands[operand++].format.tiles();
    const int64_t left = std::min(end, before + p_.operands[operand].format.tiles()) - tile;
    count = !p_.gated && rows_ >= kPairingRows && dots_[operand].two && left >= 2 ? 2 : 1;
    const size_t other = p_.gated ? 1 : operand;
    const int64_t at = tile - before;
    const Tiles::Side sides[2] = {{p_.operands[operand], dots_[operand], at}, {p_.operands[other], dots_[other], at + count - 1}};
    multiply_tiles(row_block, {{sides[0], sides[1]}, operand, count, count == 2 || (p_.gated && twins_)}, shapes);
  }
}

// Inputs that are multiplied for all panels before the next ones; the bits do not depend on it.
int64_t ProductRunner::Part::stretch(const Tiles& t) const {
  const int64_t most = std::min(t.sides[0].dot.stretch, t.sides[1].dot.stretch);
  if (!most || panels_ == 1) return p_.inputs;
  return round_up(ceil_div(p_.inputs, ceil_div(p_.inputs, most)), kGroup);
}

// Some inputs' part of the tiles, in the form in which they are multiplied; it stays valid until the next call of this thread.
void ProductRunner::Part::unpack(const Tiles& t, int64_t begin, int64_t end, const uint8_t* (&parts)[2]) const {
  for (int i = 0; i < 2; ++i) parts[i] = t.sides[i].packed() + t.sides[i].blocks(begin) * t.sides[i].operand.format.block_bytes();
  if (!unpacks_) return;
  static thread_local Scratch scratch;
  size_t bytes[2] = {};
  for (int i = 0; i < 2; ++i) bytes[i] = t.sides[i].dot.unpack ? t.sides[i].dot.block_bytes * round_up(t.sides[i].blocks(end - begin), 2) : 0;
  uint8_t* at = static_cast<uint8_t*>(scratch.get(bytes[0] + bytes[1]));
  for (int i = 0; i < (t.both || p_.gated ? 2 : 1); at += bytes[i++]) {
    const Tiles::Side& side = t.sides[i];
    if (!side.dot.unpack) continue;
    side.dot.unpack(parts[i], side.blocks(end - begin), at);
    parts[i] = at;
  }
}

void ProductRunner::Part::multiply_tiles(int64_t row_block, const Tiles& t, Shapes& shapes) const {
  static thread_local Scratch scratch;
  using Sums = float[2][kMostPanel * kLanes];
  alignas(64) Sums one;
  const int64_t first = row_block * k_.panels_together, last = std::min<int64_t>(panels_, first + k_.panels_together), step = stretch(t);
  Sums* const sums = step < p_.inputs ? static_cast<Sums*>(scratch.get(k_.panels_together * sizeof(Sums))) : &one;
  for (int64_t begin = 0; begin < p_.inputs; begin += step) {
    const int64_t end = std::min(begin + step, p_.inputs);
    const uint8_t* parts[2];
    unpack(t, begin, end, parts);
    for (int64_t panel = first; panel < last; ++panel) {
      auto& found = sums[step < p_.inputs ? panel - first : 0];
      const PanelBuffers b = buffers(panel);
      const Panel x{b.groups, b.tiles, b.floats, b.pairs};
      const auto multiply = [&](int side, bool both) {
        const Tiles::Side& s = t.sides[side];
        const uint8_t* ahead[2];
        for (int i = 0; i < 2; ++i) {
          const Tiles::Side& other = t.sides[both ? i : side];
          ahead[i] = other.packed() + t.count * other.operand.format.tile_bytes() + other.blocks(begin) * other.operand.format.block_bytes();
        }
        float* const out[2] = {found[side], found[1]};
        shapes.set(s.dot.shapes);
        (both ? s.dot.two : s.dot.one)(parts + side, s.blocks(begin), s.blocks(end - begin),
                                       {{ahead[0], ahead[1]}, s.operand.format.block_bytes(), panel - first, last - first}, x, rows_in(panel), out);
      };
      multiply(0, t.both);
      if (p_.gated && !t.both) multiply(1, false);
      if (end == p_.inputs) finish(t, panel, found[0], found[1]);
    }
  }
}

void ProductRunner::Part::finish(const Tiles& t, int64_t panel, float* sums, float* others) const {
  const auto store = [&](int64_t tile, float* found, const float* other) {
    update(t.operand, panel, tile, found);
    const Finish& f = t.sides[0].operand.finish;
    k_.finish_tile(f, found, other, rows_in(panel), lanes_in(t.sides[0].operand.format, tile), first_ + panel * k_.panel, tile * kLanes);
  };
  if (p_.gated) update(1, panel, t.sides[1].tile, others);
  store(t.sides[0].tile, sums, p_.gated ? others : nullptr);
  if (t.count == 2) store(t.sides[1].tile, others, nullptr);
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
