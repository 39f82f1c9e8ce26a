#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tars {
namespace {

constexpr int64_t kWorthSharing = 150'000;  // multiply-adds that take about as long as waking a thread
constexpr int64_t kTokensWorthSharing = 32;
constexpr int64_t kTokensPerTask = 2;       // of a rope_write: a microsecond or two

using Plan = AttentionPlan;

void add_query(Plan& plan, AttentionTask task) {
  const int64_t begin = task.begin, end = task.end, first = begin / kSegment, segments = ceil_div(end, kSegment) - first;
  if (segments > 1) plan.merges.emplace_back(plan.tasks.size(), segments);
  for (int64_t i = first; i < first + segments; ++i) {
    task.begin = std::max(i * kSegment, begin);
    task.end = std::min((i + 1) * kSegment, end);
    // An offset for now: the memory is allocated when its size is known. Never null, because null means a block.
    task.partial = reinterpret_cast<float*>((plan.partials + 1) * sizeof(float));
    plan.partials += task.group * partial_floats(task.head_dim);
    task.whole = segments == 1;
    plan.tasks.push_back(task);
  }
}

// Tasks of `count` queries from `offset` of a row, for every KV head.
void add_block(Plan& plan, AttentionTask task, int64_t begin, int64_t offset, int64_t cached) {
  task.first = begin + offset;
  task.position = cached + offset;
  task.end = task.position + task.count;
  task.begin = task.window ? std::max<int64_t>(task.position - task.window + 1, 0) : 0;
  const int64_t group = task.heads / task.kv_heads;
  plan.macs += (task.end - task.begin) * task.count * task.heads * task.head_dim * 2;
  for (task.kv_head = 0; task.kv_head < task.kv_heads; ++task.kv_head) {
    for (int64_t at = 0; at < group; at += kQueryRows) {  // of more heads than lanes, some at a time
      task.head = task.kv_head * group + at;
      task.group = std::min<int64_t>(group - at, kQueryRows);
      if (task.count == 1) add_query(plan, task);
      else plan.tasks.push_back(task);
    }
  }
}

void plan_row(Plan& plan, const Attention& a, int64_t row) {
  const int64_t begin = a.query_starts[row], length = a.query_starts[row + 1] - begin, cached = a.kv_lengths[row] - length;
  if (length <= 0) return;
  AttentionTask task = a.base;
  task.table = a.page_tables + row * a.table_width;
  const int64_t group = std::min<int64_t>(task.heads / task.kv_heads, kQueryRows);
  const int64_t block = length == 1 ? 1 : kQueryRows / group;
  for (int64_t offset = (length - 1) / block * block; offset >= 0; offset -= block) {  // the longest first
    task.count = std::min(block, length - offset);
    add_block(plan, task, begin, offset, cached);
  }
}

void clear_padding(const Attention& a) {
  const int64_t size = a.base.heads * a.base.head_dim * size_of(a.base.q_type);
  const int64_t used = a.rows ? a.query_starts[a.rows] : 0;
  std::memset(static_cast<char*>(a.base.out) + used * size, 0, (a.tokens - used) * size);
}

}  // namespace

void plan_attention(const Attention& a, AttentionPlan* out) {
  Plan& plan = *out;
  plan.tasks.clear();
  plan.merges.clear();
  plan.macs = plan.partials = 0;
  for (int64_t row = 0; row < a.rows; ++row) plan_row(plan, a, row);
  clear_padding(a);
  static thread_local Scratch partials;
  char* base = static_cast<char*>(partials.get((plan.partials + 16) * sizeof(float)));
  for (AttentionTask& task : plan.tasks)
    if (task.partial) task.partial = reinterpret_cast<float*>(base + reinterpret_cast<uintptr_t>(task.partial));
}

void add_attention(Stages& stages, const AttentionPlan& plan, const LayerPages& pages, int threads) {
  stages.add(static_cast<int64_t>(plan.tasks.size()), [&plan, &pages, threads](int64_t i) {
    static thread_local Scratch scratch;
    const Kernels& k = kernels();
    AttentionTask task = plan.tasks[i];
    task.k_pages = pages.k;
    task.v_pages = pages.v;
    const size_t next = i + threads;
    task.next = next < plan.tasks.size() ? &plan.tasks[next] : nullptr;
    k.attend(task, static_cast<float*>(scratch.get(attention_scratch(task.head_dim) * sizeof(float))));
    if (task.whole) k.merge(task, 1);
  });
  stages.add(static_cast<int64_t>(plan.merges.size()), [&plan](int64_t i) {
    const auto [first, segments] = plan.merges[i];
    kernels().merge(plan.tasks[first], segments);
  });
}

void run_attention(Pool& pool, const Attention& a, const LayerPages& pages) {
  AttentionPlan plan;
  plan_attention(a, &plan);
  Stages stages;
  const int threads = plan.macs > kWorthSharing ? pool.threads() : 1;
  add_attention(stages, plan, pages, threads);
  run_stages(pool, threads, std::move(stages));
}

namespace {

void write_token(const RopeWrite& w, const LayerPages& pages, int64_t t) {
  const Kernels& k = kernels();
  const int64_t dim = w.q.head_dim, row = cache_bytes(w.cache_type, dim);
  for (int64_t h = 0; h < w.q.heads; ++h) k.rotate(w.q, t, h, static_cast<char*>(w.q_out) + (t * w.q.heads + h) * dim * size_of(w.q.type), w.q.type);
  if (w.slot_pages[t] == 0) return;  // padding; several threads would write the same place
  for (int64_t h = 0; h < w.k.heads; ++h) {
    const int64_t at = ((w.slot_pages[t] * w.k.heads + h) * w.page + w.slot_offsets[t]) * row;
    k.rotate(w.k, t, h, static_cast<char*>(pages.k) + at, w.cache_type);
    k.rotate(w.v, t, h, static_cast<char*>(pages.v) + at, w.cache_type);
  }
}

}  // namespace

void add_rope_write(Stages& stages, const RopeWrite& w, const LayerPages& pages) {
  stages.add(ceil_div(w.tokens, kTokensPerTask), [&w, &pages](int64_t task) {
    const int64_t end = std::min((task + 1) * kTokensPerTask, w.tokens);
    for (int64_t t = task * kTokensPerTask; t < end; ++t) write_token(w, pages, t);
  });
}

void run_rope_write(Pool& pool, const RopeWrite& w, const LayerPages& pages) {
  Stages stages;
  add_rope_write(stages, w, pages);
  run_stages(pool, w.tokens > kTokensWorthSharing ? pool.threads() : 1, std::move(stages));
}

}  // namespace tars
