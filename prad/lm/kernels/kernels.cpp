// The kernels' C interface, as structs.py declares it: lists of calls, each a kind and a struct of arguments.
#include <chrono>

#include "affine.h"
#include "attention.h"
#include "linear.h"
#include "lowrank.h"
#include "prompt.h"
#include "rows.h"
#include "scale.h"

enum class Kind : int32_t { linear, norm, rotate, attention, argmax, low_rank, scale, activate, prompt, affine, mean };

struct Call {
  Kind kind;
  int32_t half;  // bfloat16, else float
  const void* arguments;
};

namespace {
template <class T>
void run(Pool& pool, Kind kind, const void* arguments, int64_t rows, const PagedView* view) {
  switch (kind) {
    case Kind::linear:
      return linear<T>(pool, *static_cast<const LinearCall*>(arguments), rows);
    case Kind::norm:
      return norm<T>(pool, *static_cast<const NormCall*>(arguments), rows);
    case Kind::rotate:
      return rotate<T>(pool, *static_cast<const RotateCall*>(arguments), rows);
    case Kind::attention:
      return paged_attention<T>(pool, *static_cast<const AttentionCall*>(arguments), rows, *view);
    case Kind::argmax:
      return argmax<T>(pool, *static_cast<const ArgmaxCall*>(arguments), rows);
    case Kind::low_rank:
      return low_rank<T>(pool, *static_cast<const LowRankCall*>(arguments));
    case Kind::scale:
      return scale<T>(pool, *static_cast<const ScaleCall*>(arguments), rows, *view);
    case Kind::activate:
      return activate_rows<T>(pool, *static_cast<const ActivateCall*>(arguments), rows);
    case Kind::prompt:
      return prompt_attention<T>(pool, *static_cast<const PromptCall*>(arguments));
    case Kind::affine:
      return affine<T>(pool, *static_cast<const AffineCall*>(arguments));
    case Kind::mean:
      return mean<T>(pool, *static_cast<const MeanCall*>(arguments));
  }
}
}  // namespace

extern "C" {
Pool* prad_pool(int32_t threads) { return new Pool(threads); }
void prad_pool_free(Pool* pool) { delete pool; }
int32_t prad_multiplies_bf16() { return multiplies_bf16(); }

// In bytes, of every struct that calls.py lists as well, in its order.
void prad_sizes(int64_t* out) {
  for (size_t size : {sizeof(Call), sizeof(PagedView), sizeof(LowRankSpan), sizeof(PromptSpan), sizeof(Linear),
                      sizeof(LinearCall), sizeof(NormCall), sizeof(RotateCall), sizeof(AttentionCall),
                      sizeof(ArgmaxCall), sizeof(LowRankCall), sizeof(ScaleCall), sizeof(ActivateCall),
                      sizeof(PromptCall), sizeof(AffineCall), sizeof(MeanCall)})
    *out++ = static_cast<int64_t>(size);
}

// All calls in order, on `rows` rows each. `view`: what attention and scale read. `seconds`, if given, gets what each took.
void prad_run(Pool* pool, const Call* calls, int64_t count, int64_t rows, const PagedView* view, double* seconds) {
  using Clock = std::chrono::steady_clock;
  for (int64_t i = 0; i < count; i++) {
    auto started = seconds ? Clock::now() : Clock::time_point{};
    const Call& c = calls[i];
    if (c.half) run<bf16>(*pool, c.kind, c.arguments, rows, view);
    else run<float>(*pool, c.kind, c.arguments, rows, view);
    if (seconds) seconds[i] = std::chrono::duration<double>(Clock::now() - started).count();
  }
}
}
