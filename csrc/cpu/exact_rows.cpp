// A row is computed in blocks of doubles. Each quantity of a whole row or block is a Wide, so that
// neither squares nor coefficients overflow or lose digits. Elements keep all their digits when
// they are multiplied with coefficients.
#include "exact_rows.h"

#include <algorithm>
#include <limits>

#include "elements.h"
#include "wide.h"

namespace wnkernel::cpu {
namespace {

constexpr int64_t kBlock = 128;

template <class F>
auto visit(DType t, F&& f) {
  switch (t) {
    case DType::f16:
      return f(f16{});
    case DType::bf16:
      return f(bf16{});
    case DType::f32:
      return f(float{});
    default:
      return f(double{});
  }
}

Wide element(const void* p, DType t, int64_t k) {
  return visit(t, [&](auto tag) { return to_double(static_cast<const decltype(tag)*>(p)[k]); });
}

void set_element(void* p, DType t, int64_t k, Wide x) {
  visit(t,
        [&](auto tag) { from_double(static_cast<double>(x), static_cast<decltype(tag)*>(p) + k); });
}

double rounded_to(DType t, double x) {
  return visit(t, [&](auto tag) { return rounded<decltype(tag)>(x); });
}

// One row of a problem, read and written a block at a time, in memory order.
struct Row {
  const RowView& view;
  int64_t row;

  int64_t blocks() const { return (view.row_size() + kBlock - 1) / kBlock; }
  int64_t size(int64_t block) const { return std::min(kBlock, view.row_size() - block * kBlock); }

  // Calls f(position in the block, index in memory, number of elements) for every run of a block.
  template <class F>
  void each_run(int64_t block, F&& f) const {
    int64_t outer = block * kBlock / view.inner, column = block * kBlock % view.inner;
    for (int64_t k = 0, end = size(block), n; k < end; k += n, column = 0, ++outer) {
      n = std::min(view.inner - column, end - k);
      f(k, (outer * view.rows + row) * view.inner + column, n);
    }
  }
  void read(const void* p, DType t, int64_t block, double* x) const {
    visit(t, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(p);
      each_run(block, [&](int64_t k, int64_t at, int64_t n) {
        for (int64_t j = 0; j < n; ++j) x[k + j] = to_double(from[at + j]);
      });
    });
  }
  void write(void* p, DType t, int64_t block, const double* x) const {
    visit(t, [&](auto tag) {
      auto* to = static_cast<decltype(tag)*>(p);
      each_run(block, [&](int64_t k, int64_t at, int64_t n) {
        for (int64_t j = 0; j < n; ++j) from_double(x[k + j], to + at + j);
      });
    });
  }
};

// The largest magnitude of a block, or NaN if the block has one.
double largest_of(const double* x, int64_t n) {
  double largest = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double size = std::fabs(x[k]);
    largest = size > largest || size != size ? size : largest;
  }
  return largest;
}

// <x, y> of a block, relative to the largest product.
Wide dot_of_any(const double* x, const double* y, int64_t n) {
  double products[kBlock], sum = 0;
  int exponents[kBlock], largest = std::numeric_limits<int>::min();
  for (int64_t k = 0; k < n; ++k) {
    const Wide product = Wide(x[k]) * y[k];
    products[k] = product.m;
    exponents[k] = product.e;
    largest = std::max(largest, product.e);
  }
  for (int64_t k = 0; k < n; ++k) sum += std::ldexp(products[k], exponents[k] - largest);
  return {sum, largest};
}

// Computes <x, y> at a tenth of the cost, relative to the largest x and y. It falls back to
// dot_of_any() if all products are far smaller than that.
Wide dot(const double* x, const double* y, int64_t n) {
  const double most_x = largest_of(x, n), most_y = x == y ? most_x : largest_of(y, n);
  if (std::min(most_x, most_y) == 0 && std::isfinite(most_x + most_y)) return 0.0;
  const int of_x = Wide(most_x).e, of_y = Wide(most_y).e;
  const double unit_x = std::ldexp(1.0, -of_x), unit_y = std::ldexp(1.0, -of_y);
  double sum = 0, most = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double product = (x[k] * unit_x) * (y[k] * unit_y);
    most = std::max(most, std::fabs(product));
    sum += product;
  }
  return is_usual(most) ? Wide(sum, of_x + of_y) : dot_of_any(x, y, n);
}

// <x, y> over the blocks [first, first + count) of a row. Blocks are added in pairs, so that errors
// do not accumulate.
Wide dot(const Row& row, const void* x, DType x_type, const void* y, DType y_type, int64_t first,
         int64_t count) {
  if (count > 1)
    return dot(row, x, x_type, y, y_type, first, count / 2) +
           dot(row, x, x_type, y, y_type, first + count / 2, count - count / 2);
  double of_x[kBlock], of_y[kBlock];
  row.read(x, x_type, first, of_x);
  if (x == y && x_type == y_type) return dot(of_x, of_x, row.size(first));
  row.read(y, y_type, first, of_y);
  return dot(of_x, of_y, row.size(first));
}

Wide norm_of(const Row& row, const void* v, DType type) {
  return root(dot(row, v, type, v, type, 0, row.blocks()));
}

// What rows are divided by, from their norm.
struct Bound {
  Wide least, added;

  Bound(double eps, DType acc)
      : least(eps < 0 ? 0.0 : rounded_to(acc, eps)), added(eps < 0 ? -eps : 0.0) {}
  Wide of(Wide norm) const { return added.m > 0 ? norm + added : norm < least ? least : norm; }
};

// The norm rounded to a type, or the norm itself if the result is no normal number.
Wide held(Wide norm, DType type) {
  const double whole = static_cast<double>(norm), held = rounded_to(type, whole);
  return held == whole ? norm : Wide(held);
}

}  // namespace

void exact_row(const Forward& p, int64_t at) {
  const Row row{p.view, at};
  const DType acc = accumulation(p.v_type);
  const Bound bound(p.eps, acc);
  const bool forced = p.forced > 0;
  const Wide of_v = norm_of(row, p.v, p.v_type);
  const Wide to_v = forced ? Wide(p.forced) / bound.of(of_v) : Wide(1);
  const Wide norm = forced ? of_v * to_v : of_v;
  const Factor scale(element(p.g, p.g_type, at) / bound.of(held(norm, p.divisor_type)) * to_v);
  const Factor scale_of_v(to_v);
  set_element(p.norm, acc, at, norm);
  for (int64_t block = 0; block < row.blocks(); ++block) {
    double v[kBlock], x[kBlock];
    row.read(p.v, p.v_type, block, v);
    for (int64_t k = 0; k < row.size(block); ++k) x[k] = scale.times(v[k]);
    row.write(p.w, p.w_type, block, x);
    if (!forced) continue;
    for (int64_t k = 0; k < row.size(block); ++k) x[k] = scale_of_v.times(v[k]);
    row.write(const_cast<void*>(p.v), p.v_type, block, x);
  }
}

void exact_row(const Backward& p, int64_t at) {
  const Row row{p.view, at};
  const Bound bound(p.eps, accumulation(p.v_type));
  const Wide norm = norm_of(row, p.v, p.v_type), n = bound.of(norm);
  const bool clamped = norm < bound.least || (norm.m == 0 && bound.added.m > 0);
  const Wide projection = dot(row, p.grad_w, p.w_type, p.v, p.v_type, 0, row.blocks()) / n;
  if (p.grad_g) set_element(p.grad_g, p.g_type, at, projection);
  if (!p.grad_v) return;
  const Factor scale(element(p.g, p.g_type, at) / n), along(clamped ? 0.0 : projection / norm);
  for (int64_t block = 0; block < row.blocks(); ++block) {
    double x[kBlock], y[kBlock];
    row.read(p.grad_w, p.w_type, block, x);
    row.read(p.v, p.v_type, block, y);
    for (int64_t k = 0; k < row.size(block); ++k) {
      const double taken = along.times(y[k]), size = std::max(std::fabs(x[k]), std::fabs(taken));
      x[k] = is_usual(size) ? scale.times(x[k] - taken)
                            : static_cast<double>(scale.wide * (x[k] - along.wide * y[k]));
    }
    row.write(p.grad_v, p.v_type, block, x);
  }
}

}  // namespace wnkernel::cpu
