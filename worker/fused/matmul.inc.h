// Small dense matrix products. Part of window.inc.h.
//
// C (rows, cols) = A B + bias. Rows of B and C are padded to whole vectors, and B's padding is zero. Element (r, k) of
// A is a[r row_step + k col_step], so that A may be transposed.

struct Operand {
  const float* a;
  int64_t row_step, col_step;
};

template <int kRows, int kWidth>
PACELINE_INLINE static inline void product_tile(Operand left, const float* b, int64_t ldb, const float* bias, float* c,
                                                int64_t ldc, int64_t depth) {
  Vec acc[kRows][kWidth];
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < kWidth; ++q) acc[r][q] = bias ? load(bias + q * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kWidth];
    for (int q = 0; q < kWidth; ++q) row[q] = load(b + k * ldb + q * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float x = left.a[r * left.row_step + k * left.col_step];
#pragma GCC unroll 4
      for (int q = 0; q < kWidth; ++q) acc[r][q] += row[q] * x;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < kWidth; ++q) store(c + r * ldc + q * kLanes, acc[r][q]);
}

template <int kWidth>
static void product_panel(Operand left, const float* b, int64_t ldb, const float* bias, float* c, int64_t ldc,
                          int64_t rows, int64_t depth) {
  constexpr int kTall = kRegisters / (kWidth + 1) / 4 * 4;  // what the registers hold besides a row of B
  static_assert(kTall > 0);
  int64_t r = 0;
  const auto at = [&](int64_t row) { return Operand{left.a + row * left.row_step, left.row_step, left.col_step}; };
  for (; r + kTall <= rows; r += kTall) product_tile<kTall, kWidth>(at(r), b, ldb, bias, c + r * ldc, ldc, depth);
  for (; r + 4 <= rows; r += 4) product_tile<4, kWidth>(at(r), b, ldb, bias, c + r * ldc, ldc, depth);
  for (; r < rows; ++r) product_tile<1, kWidth>(at(r), b, ldb, bias, c + r * ldc, ldc, depth);
}

// cols is a multiple of kLanes.
static void product(Operand left, const float* b, int64_t ldb, const float* bias, float* c, int64_t ldc, int64_t rows,
                    int64_t cols, int64_t depth) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes)
    product_panel<2>(left, b + j, ldb, bias ? bias + j : nullptr, c + j, ldc, rows, depth);
  if (j < cols) product_panel<1>(left, b + j, ldb, bias ? bias + j : nullptr, c + j, ldc, rows, depth);
}

// A few rows times a matrix of any width, which is not padded: y (rows, cols) = x (rows, depth) w + bias.
static void linear(const float* x, int64_t rows, int64_t depth, const float* w, const float* bias, int64_t cols,
                   float* y) {
  constexpr int kWidth = kRegisters / 8;
  const Operand left{x, depth, 1};
  int64_t j = 0;
  for (; j + kWidth * kLanes <= cols; j += kWidth * kLanes)
    product_panel<kWidth>(left, w + j, cols, bias + j, y + j, cols, rows, depth);
  for (; j + kLanes <= cols; j += kLanes)
    product_panel<1>(left, w + j, cols, bias + j, y + j, cols, rows, depth);
  for (; j < cols; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = bias[j];
      for (int64_t k = 0; k < depth; ++k) sum += x[r * depth + k] * w[k * cols + j];
      y[r * cols + j] = sum;
    }
}

// to (cols, padded(rows)) = from (rows, cols) transposed.
static void transpose(const float* from, int64_t ld, int64_t rows, int64_t cols, float* to) {
  const int64_t width = padded(rows);
  for (int64_t c = 0; c < cols; ++c) std::fill(to + c * width + rows, to + (c + 1) * width, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) to[c * width + r] = from[r * ld + c];
}
