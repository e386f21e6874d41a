// The CPU kernels in a program of their own, which a processor that is only emulated can run: the baseline, which is
// NEON on aarch64, against the recurrence in float64. Fails with the first type and tensor whose error is too large.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#define WKV_ISA alone
#define WKV_SIMD_BYTES 16
#include "../csrc/cpu/kernel.h"

using namespace wkv;
using namespace wkv::cpu;
using Numbers = std::vector<double>;

constexpr int64_t T = 150, C = 37;  // intervals, subchunks and vectors that are full, and others

template <class Element>
struct Tensor {
  std::vector<Element> data = std::vector<Element>(T * C);

  void set(const Numbers& numbers) {
    for (int64_t i = 0; i < T * C; ++i) {
      if constexpr (std::is_same_v<Element, double>) {
        data[i] = numbers[i];
      } else {
        Element lanes[alone::Vec<float>::lanes];
        store(lanes, alone::Vec<float>(float(numbers[i])));
        data[i] = lanes[1];
      }
    }
  }
  Numbers get() const {
    Numbers numbers(T * C);
    for (int64_t i = 0; i < T * C; ++i)
      numbers[i] = alone::load_some<decltype(alone::load(data.data()))>(&data[i], 1).native[0];
    return numbers;
  }
  Sequence sequence() const { return {data.data(), T * C, C}; }
};

Numbers normal(int seed, double scale) {
  std::mt19937 draw(seed);
  std::normal_distribution<double> number;
  Numbers numbers(T * C);
  for (double& x : numbers) x = scale * number(draw);
  return numbers;
}

template <DType dtype>
bool is_right(double key_scale) {
  using K = alone::Kernel<dtype>;
  using Element = typename K::Element;
  using Real = typename K::Real;
  Tensor<Element> k, v, gy, y, gk, gv;
  k.set(normal(1, key_scale)), v.set(normal(2, 1)), gy.set(normal(3, 1));
  std::vector<Real> rows(4 * C), state(3 * C), gstate(3 * C), checkpoints(3 * C * (T / 64 + 2));
  for (int64_t c = 0; c < C; ++c) rows[c] = -std::exp(-6 + 8.0 * c / C), rows[C + c] = 2 * std::sin(c);
  K::exponentiate(C, rows.data());
  Numbers partials(2 * C);

  ForwardParams forward{};
  forward.dtype = dtype, forward.B = 1, forward.T = T, forward.C = C, forward.N = 1;
  forward.k = k.sequence(), forward.v = v.sequence();
  forward.channels = {&rows[0], &rows[C], &rows[2 * C], &rows[3 * C]};
  BackwardParams backward{};
  static_cast<Params&>(backward) = forward;
  forward.y = y.data.data(), forward.state_out = state.data(), forward.checkpoints = checkpoints.data();
  backward.checkpoints = checkpoints.data(), backward.gy = gy.sequence(), backward.partials = partials.data();
  backward.gk = gk.data.data(), backward.gv = gv.data.data(), backward.gstate = gstate.data();
  WorkItem item{};
  item.sequence = view_of_batch<int64_t>(dtype, T, 0);
  item.row = item.spare_checkpoint = -1, item.opens_partials = true, item.t_end = T, item.c_end = C;
  alone::forward(forward, item);
  alone::backward(backward, item);

  const Numbers keys = k.get(), values = v.get(), gradients = gy.get();
  Numbers exact_y(T * C), exact_gk(T * C), exact_gv(T * C);
  for (int64_t c = 0; c < C; ++c) {
    const double decay = std::exp(double(rows[c])), bonus = std::exp(double(rows[C + c]));
    Numbers nums(T), dens(T);
    double num = 0, den = 0, adjoint_num = 0, adjoint_den = 0;
    for (int64_t t = 0; t < T; ++t) {
      const double weight = std::exp(keys[t * C + c]), value = values[t * C + c];
      nums[t] = num, dens[t] = den;
      exact_y[t * C + c] = (num + bonus * weight * value) / (den + bonus * weight);
      num = decay * num + weight * value, den = decay * den + weight;
    }
    for (int64_t t = T - 1; t >= 0; --t) {
      const int64_t i = t * C + c;
      const double weight = std::exp(keys[i]), value = values[i];
      const double h = gradients[i] / (dens[t] + bonus * weight);
      exact_gv[i] = weight * adjoint_num + bonus * weight * h;
      exact_gk[i] = weight * (value * adjoint_num + adjoint_den) + bonus * weight * h * (value - exact_y[i]);
      adjoint_num = decay * adjoint_num + h, adjoint_den = decay * adjoint_den - h * exact_y[i];
    }
  }

  // As problems.py derives it.
  const double unit = dtype == DType::float64 ? 0x1p-52 : 0x1p-24;
  const double output = dtype == DType::bfloat16 ? 0x1p-8 : dtype == DType::float16 ? 0x1p-11 : unit;
  double logit = 10;  // of decays and bonuses
  for (double key : keys) logit = std::max(logit, 10 + std::abs(key));
  const double allowed = 6 * unit * std::sqrt(double(T)) * (2 + logit) + output;
  const auto is_close = [&](const char* name, const Numbers& found, const Numbers& exact) {
    double error = 0, scale = 0;
    for (int64_t i = 0; i < T * C; ++i) {
      const double difference = std::abs(found[i] - exact[i]);
      error = difference <= error ? error : difference;  // NaN is the largest
      scale = std::max(scale, std::abs(exact[i]));
    }
    const bool passes = error <= allowed * scale;
    std::printf("%s, keys of %g: %s %.1e%s\n", name_of(dtype), key_scale, name, error / scale, passes ? "" : " FAILED");
    return passes;
  };
  return is_close("y", y.get(), exact_y) & is_close("gk", gk.get(), exact_gk) & is_close("gv", gv.get(), exact_gv);
}

int main() {
  bool right = true;
  for (double key_scale : {1.0, 30.0}) {
    right &= is_right<DType::float32>(key_scale) & is_right<DType::float16>(key_scale) &
             is_right<DType::bfloat16>(key_scale) & is_right<DType::float64>(key_scale);
  }
  return right ? 0 : 1;
}
