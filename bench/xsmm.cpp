// A model's products by libxsmm, in float32: weights in panels of so many outputs, one of its kernels for a panel and
// up to so many rows, panels shared out among OpenMP's threads. Built for the machine at hand by libraries.py.
#include <libxsmm.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kPanel = 64, kRows = 64;

struct Matrix {
  int out, in;
  float* panels;  // [out / kPanel][in][kPanel]; the last of them narrower

  int width(int first) const { return out - first < kPanel ? out - first : kPanel; }
};

libxsmm_smmfunction kernel(const Matrix& m, int width, int rows) {
  int by = width, of = m.in, to = m.out, flags = LIBXSMM_GEMM_FLAG_NONE;
  float all = 1, none = 0;
  // it counts columns first: outputs by inputs, times inputs by rows
  return libxsmm_smmdispatch(width, rows, m.in, &by, &of, &to, &all, &none, &flags, nullptr);
}

}  // namespace

extern "C" const char* xsmm_version() { return LIBXSMM_VERSION; }

// weight [out, in], copied; for as long as the process lives.
extern "C" void* xsmm_pack(const float* weight, int out, int in) {
  auto* m = new Matrix{out, in, static_cast<float*>(std::aligned_alloc(64, (sizeof(float) * out * in + 63) / 64 * 64))};
  float* to = m->panels;
  for (int first = 0; first < out; first += kPanel)
    for (int k = 0; k < in; k++)
      for (int o = 0; o < m->width(first); o++) *to++ = weight[static_cast<long>(first + o) * in + k];
  return m;
}

// x [rows, in] to y [rows, out]; false where it has no kernel for the shape.
extern "C" bool xsmm_multiply(const void* matrix, const float* x, float* y, int rows, int threads) {
  const Matrix& m = *static_cast<const Matrix*>(matrix);
  int panels = (m.out + kPanel - 1) / kPanel, last = m.width((panels - 1) * kPanel);
  int full = rows < kRows ? rows : kRows, rest = rows % full;
  libxsmm_smmfunction by[2][2] = {  // a panel's width, the number of rows
      {kernel(m, panels > 1 ? kPanel : last, full), rest ? kernel(m, panels > 1 ? kPanel : last, rest) : nullptr},
      {kernel(m, last, full), rest ? kernel(m, last, rest) : nullptr}};
  for (auto& each : by)
    if (!each[0] || (rest && !each[1])) return false;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int p = 0; p < panels; p++) {
    const float* panel = m.panels + static_cast<long>(p) * kPanel * m.in;
    for (int row = 0; row < rows; row += full) {
      const float* from = x + static_cast<long>(row) * m.in;
      by[p == panels - 1][rows - row < full](panel, from, y + static_cast<long>(row) * m.out + p * kPanel);
    }
  }
  return true;
}
