// The kernels' C interface: lists of calls, each an operation and a struct of its arguments (operations.h).
#include <chrono>

#include "affine.h"
#include "attention.h"
#include "linear.h"
#include "lowrank.h"
#include "operations.h"
#include "prompt.h"
#include "rows.h"
#include "scale.h"

namespace {
// What computes each operation, on activations of T.
template <class T>
struct Run {
  Pool& pool;
  int64_t rows;
  const PagedView* view;

  void operator()(const LinearCall& call) const { linear<T>(pool, call, rows); }
  void operator()(const NormCall& call) const { norm<T>(pool, call, rows); }
  void operator()(const RotateCall& call) const { rotate<T>(pool, call, rows); }
  void operator()(const AttentionCall& call) const { paged_attention<T>(pool, call, rows, *view); }
  void operator()(const ArgmaxCall& call) const { argmax<T>(pool, call, rows); }
  void operator()(const LowRankCall& call) const { low_rank<T>(pool, call); }
  void operator()(const ScaleCall& call) const { scale<T>(pool, call, rows, *view); }
  void operator()(const ActivateCall& call) const { activate_rows<T>(pool, call, rows); }
  void operator()(const PromptCall& call) const { prompt_attention<T>(pool, call); }
  void operator()(const AffineCall& call) const { affine<T>(pool, call); }
  void operator()(const MeanCall& call) const { mean<T>(pool, call); }
};
}  // namespace

extern "C" {
Pool* prad_pool(int32_t threads) { return new Pool(threads); }
void prad_pool_free(Pool* pool) { delete pool; }
const char* prad_declared() { return kDeclared; }

// All calls in order, on `rows` rows each. `view`: what attention and scale read. `seconds`, if given, gets what each took.
void prad_run(Pool* pool, const Call* calls, int64_t count, int64_t rows, const PagedView* view, double* seconds) {
  using Clock = std::chrono::steady_clock;
  for (int64_t i = 0; i < count; i++) {
    auto started = seconds ? Clock::now() : Clock::time_point{};
    const Call& c = calls[i];
    if (c.half) with_arguments(c.kind, c.arguments, Run<bf16>{*pool, rows, view});
    else with_arguments(c.kind, c.arguments, Run<float>{*pool, rows, view});
    if (seconds) seconds[i] = std::chrono::duration<double>(Clock::now() - started).count();
  }
}
}
