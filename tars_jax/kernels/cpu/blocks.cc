#include "blocks.h"

#include <algorithm>

namespace tars {
namespace {

constexpr size_t kMostStages = 11;  // of a block

// What one block hands to the next part of itself; all blocks use the same memory.
struct Buffers {
  char *q, *k, *v, *heads, *middle, *inner;  // [rows, H * hd], [rows, KH * hd] twice, [rows, H * hd], [rows, width], [rows, F]
};

class Carver {  // cuts pieces off a memory, or only counts
 public:
  explicit Carver(char* memory) : at_(memory) {}
  char* take(int64_t bytes) {
    char* piece = at_ ? at_ + used_ : nullptr;
    used_ += ceil_div(bytes, 64) * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* at_;
  int64_t used_ = 0;
};

Buffers carve(const Blocks& b, Carver& memory) {
  const int64_t row = b.rows * size_of(b.type), hd = b.attention.base.head_dim;
  int64_t inner = 0;
  for (const Block& block : b.blocks) inner = std::max(inner, block.up.format.outputs);
  const int64_t q = row * b.attention.base.heads * hd, kv = row * b.attention.base.kv_heads * hd;
  const int64_t panels = ceil_div(b.rows, kMostPanel) * kMostPanel * 2;  // bytes of pairs a column
  return {memory.take(q), memory.take(kv), memory.take(kv), memory.take(q), memory.take(row * b.width), memory.take(std::max(row, panels) * inner)};
}

Operand storing(Operand w, void* out, DType type, const void* residual = nullptr) {
  w.finish.out = out;
  w.finish.out_type = w.finish.residual_type = type;
  w.finish.outputs = w.format.outputs;
  w.finish.residual = residual;
  return w;
}

// in_panels: the results are written as the next product wants them.
Product widening(const Blocks& b, const Block& w, const Buffers& m, bool in_panels) {
  Product p{m.middle, b.type, b.rows, b.width, w.mlp_norm, b.eps, {}, w.gate.data != nullptr, b.prompts_at};
  if (p.gated) {
    p.operands = {storing(w.gate, m.inner, b.type), w.up};
    p.operands[0].finish.other_bias = w.up.finish.bias;
  } else {
    p.operands = {storing(w.up, m.inner, b.type)};
  }
  p.operands[0].finish.activation = b.activation;
  p.operands[0].finish.pairs = in_panels;
  return p;
}

class BlockRunner {
 public:
  BlockRunner(const Blocks& b, const Block& w, const Buffers& m, const void* x)
      : write_(b.write),
        pages_(w.pages),
        project_({x, b.type, b.rows, b.width, w.attention_norm, b.eps,
                 {storing(w.q, m.q, b.type), storing(w.k, m.k, b.type), storing(w.v, m.v, b.type)}, false, b.prompts_at}),
        output_({m.heads, b.type, b.rows, w.o.format.inputs, {}, 0.0f, {storing(w.o, m.middle, b.type, x)}, false, b.prompts_at}),
        narrow_({m.inner, b.type, b.rows, w.down.format.inputs, {}, 0.0f, {storing(w.down, b.out, b.type, m.middle)}, false, b.prompts_at}),
        widen_(widening(b, w, m, fills_panels(b))) {
    if (fills_panels(b)) narrow_.take_panels(m.inner);
    write_.q.in = write_.q_out = m.q;
    write_.k.in = m.k;
    write_.v.in = m.v;
    write_.q.norm = w.q_norm;
    write_.k.norm = w.k_norm;
    if (!w.rotates) write_.q.half = write_.k.half = 0;
  }

  int64_t bytes_of_panels() const {
    return std::max({project_.bytes_of_panels(), output_.bytes_of_panels(), widen_.bytes_of_panels(), narrow_.bytes_of_panels()});
  }
  bool worth_sharing() const { return project_.worth_sharing() || widen_.worth_sharing(); }
  void add_to(Stages& stages, const AttentionPlan& plan, int threads, char* memory) {
    project_.add_to(stages, threads, memory);
    add_rope_write(stages, write_, pages_);
    add_attention(stages, plan, pages_, threads);
    output_.add_to(stages, threads, memory);
    widen_.add_to(stages, threads, memory);
    narrow_.add_to(stages, threads, memory);
  }

 private:
  // Float16 states would be rounded to that first where a step has other rows too.
  bool fills_panels(const Blocks& b) const { return b.type != DType::kF16 && narrow_.takes_panels(); }

  RopeWrite write_;
  const LayerPages pages_;
  ProductRunner project_, output_, narrow_, widen_;
};

}  // namespace

void run_blocks(Pool& pool, Blocks& b) {
  if (!b.rows) return;
  static thread_local Scratch scratch, panels;
  Carver counted(nullptr);
  carve(b, counted);
  Carver memory(static_cast<char*>(scratch.get(counted.used())));
  const Buffers m = carve(b, memory);
  b.attention.base.q = m.q;
  b.attention.base.out = m.heads;
  AttentionPlan plan;
  plan_attention(b.attention, &plan);
  std::vector<BlockRunner> runners;
  runners.reserve(b.blocks.size());  // stages point to them
  int64_t bytes = 0;
  for (const Block& w : b.blocks) {
    runners.emplace_back(b, w, m, runners.empty() ? b.x : b.out);
    bytes = std::max(bytes, runners.back().bytes_of_panels());
  }
  const int threads = runners.size() > 1 || runners[0].worth_sharing() ? pool.threads() : 1;
  char* panel_memory = static_cast<char*>(panels.get(bytes));
  Stages stages;
  stages.reserve(runners.size() * kMostStages);
  for (BlockRunner& r : runners) r.add_to(stages, plan, threads, panel_memory);
  run_stages(pool, threads, std::move(stages));
}

}  // namespace tars
