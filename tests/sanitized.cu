// The CUDA kernels without torch, for compute-sanitizer: every kernel and dtype, on a few shapes with tails, planned
// for this device and for smaller ones.
//
// Each call's y, final state and gradients are compared with a plain loop in double on the host. Outputs start as NaN,
// so that an unwritten element is detected; workspaces start as cudaMalloc left them, so that initcheck detects a
// read before a write. With the argument "hog" all of it runs beside a kernel that leaves one multiprocessor free.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "gpu/tile.h"

namespace {

using wkv::DType;
using wkv::Kernel;
using wkv::Operation;
using Values = std::vector<double>;
using Launches = std::vector<wkv::Launch>;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

// ---- memory of the device ----

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, static_cast<size_t>(bytes > 0 ? bytes : 1)), "cudaMalloc");
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* get() const { return data_; }
  void poison() const { check(cudaMemset(data_, 0xff, static_cast<size_t>(bytes_)), "cudaMemset"); }

  template <class T>
  void write(const std::vector<T>& values) const {
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  template <class T>
  std::vector<T> read(int64_t count) const {
    std::vector<T> values(static_cast<size_t>(count));
    check(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

// Numbers of one type in the device's memory; `values` are rounded to the type.
template <class T>
struct Input {
  Values values;
  Memory memory;

  explicit Input(const Values& given) : memory(static_cast<int64_t>(given.size() * sizeof(T))) {
    std::vector<T> rounded(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      wkv::from_real(static_cast<wkv::RealOf<wkv::kTypeOf<T>>>(given[i]), rounded[i]);
      values.push_back(wkv::to_real(rounded[i]));
    }
    memory.write(rounded);
  }
};

template <class T>
struct Output {
  int64_t count;
  Memory memory;

  explicit Output(int64_t count) : count(count), memory(count * static_cast<int64_t>(sizeof(T))) { memory.poison(); }
  Values values() const {
    Values result;
    for (const T& value : memory.read<T>(count)) result.push_back(wkv::to_real(value));
    return result;
  }
};

// ---- a device, and a kernel that keeps it busy ----

// Takes the place of any other block on a multiprocessor, by its shared memory, for some milliseconds.
__global__ void hog() {
  const long long started = clock64();
  while (clock64() - started < 8'000'000) __nanosleep(1000);
}

class Device {
 public:
  const wkv::DeviceLimits limits = wkv::device_limits(0);
  int launches = 0, done_before_the_hog = 0;

  explicit Device(bool beside_a_hog) : beside_a_hog_(beside_a_hog && limits.multiprocessors > 1) {
    // Streams that wait neither for the default one nor for each other.
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    check(cudaStreamCreateWithFlags(&other_, cudaStreamNonBlocking), "stream");
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&hog), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(limits.shared_per_block)),
          "shared memory");
  }

  cudaStream_t stream() const { return stream_; }

  // Runs the launches behind the stream's earlier work, and waits for the end of all.
  void run(const Launches& work) {
    if (beside_a_hog_) {
      // One block for each multiprocessor but one.
      const dim3 grid(static_cast<unsigned>(limits.multiprocessors) - 1), block(32);
      check(cudaDeviceSynchronize(), "before the hog");
      check(cudaLaunchKernel(reinterpret_cast<const void*>(&hog), grid, block, nullptr,
                             static_cast<size_t>(limits.shared_per_block), other_),
            "hog");
    }
    for (const wkv::Launch& launch : work) check(wkv::launch(launch, stream_), "launch");
    check(cudaStreamSynchronize(stream_), "kernel");
    ++launches;
    done_before_the_hog += beside_a_hog_ && cudaStreamQuery(other_) == cudaErrorNotReady;
  }

 private:
  bool beside_a_hog_;
  cudaStream_t stream_ = nullptr, other_ = nullptr;
};

// ---- the operator on the host ----

struct Problem {
  int64_t B, T, C;
};

struct Inputs {
  Values w, u, k, v, state, gy, gstate_out, r;  // r of every step; a token has that of the first ones
};

struct Expected {
  Values y, state, gw, gu, gk, gv, gstate;  // state: num / den and log(den) + max
};

// Sums that are not scaled by their maximum: keys of a few and some hundred steps leave them far from double's range.
// `max_out` [B, C] is the scale that the gradient of the final state is relative to.
Expected solve(const Problem& p, const Inputs& in, const Values& max_out) {
  Expected out;
  const auto size = [](int64_t count) { return Values(static_cast<size_t>(count)); };
  out.y = out.gk = out.gv = size(p.B * p.T * p.C);
  out.state = size(p.B * 2 * p.C);
  out.gstate = size(p.B * 3 * p.C);
  out.gw = out.gu = size(p.C);
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t c = 0; c < p.C; ++c) {
      const auto of_state = [&](int64_t row) { return (b * 3 + row) * p.C + c; };
      const double log_decay = -std::exp(in.w[c]), decay = std::exp(log_decay);
      const double scale = std::exp(in.state[of_state(2)]);
      Values nums = {in.state[of_state(0)] * scale}, dens = {in.state[of_state(1)] * scale};
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t i = (b * p.T + t) * p.C + c;
        const double weight = std::exp(in.k[i]), now = std::exp(in.u[c] + in.k[i]);
        out.y[i] = (nums[t] + now * in.v[i]) / (dens[t] + now);
        nums.push_back(decay * nums[t] + weight * in.v[i]);
        dens.push_back(decay * dens[t] + weight);
      }
      out.state[(b * 2) * p.C + c] = nums[p.T] / dens[p.T];
      out.state[(b * 2 + 1) * p.C + c] = std::log(dens[p.T]);
      if (max_out.empty()) continue;

      const double unscale = std::exp(-max_out[b * p.C + c]);
      double gnum = in.gstate_out[of_state(0)] * unscale, gden = in.gstate_out[of_state(1)] * unscale;
      double gdecay = 0;
      for (int64_t t = p.T - 1; t >= 0; --t) {
        const int64_t i = (b * p.T + t) * p.C + c;
        const double weight = std::exp(in.k[i]), now = std::exp(in.u[c] + in.k[i]);
        const double gread = in.gy[i] / (dens[t] + now), gden_read = -gread * out.y[i];
        const double gnow = (gread * in.v[i] + gden_read) * now;
        out.gk[i] = gnow + (gnum * in.v[i] + gden) * weight;
        out.gv[i] = gread * now + gnum * weight;
        out.gu[c] += gnow;
        gdecay += gnum * nums[t] + gden * dens[t];
        gnum = gnum * decay + gread;
        gden = gden * decay + gden_read;
      }
      out.gw[c] += gdecay * decay * log_decay;
      out.gstate[of_state(0)] = gnum * scale;
      out.gstate[of_state(1)] = gden * scale;
      out.gstate[of_state(2)] = gnum * nums[0] + gden * dens[0];
    }
  }
  return out;
}

struct BiExpected {
  Values y, g_log_decay, gu, gk, gv;
};

// Of both directions, likewise. A direction's sums and adjoints run against each other, so that one loop serves both.
BiExpected solve_both_directions(const Problem& p, const Inputs& in) {
  BiExpected out;
  out.y = out.gk = out.gv = Values(static_cast<size_t>(p.B * p.T * p.C));
  out.g_log_decay = out.gu = Values(static_cast<size_t>(p.C));
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t c = 0; c < p.C; ++c) {
      const auto at = [&](int64_t t) { return (b * p.T + t) * p.C + c; };
      const double decay = std::exp(-std::exp(in.w[c]));
      Values nums[2], dens[2];  // of the steps before each step, and of those after it
      for (const int side : {0, 1}) {
        nums[side] = dens[side] = Values(static_cast<size_t>(p.T));
        for (int64_t n = 1; n < p.T; ++n) {
          const int64_t t = side == 0 ? n : p.T - 1 - n, from = side == 0 ? t - 1 : t + 1;
          const double weight = std::exp(in.k[at(from)]);
          nums[side][t] = decay * nums[side][from] + weight * in.v[at(from)];
          dens[side][t] = decay * dens[side][from] + weight;
        }
      }
      Values gnums(static_cast<size_t>(p.T)), gdens = gnums;  // of the reads
      for (int64_t t = 0; t < p.T; ++t) {
        const double now = std::exp(in.u[c] + in.k[at(t)]), den = dens[0][t] + dens[1][t] + now;
        out.y[at(t)] = (nums[0][t] + nums[1][t] + now * in.v[at(t)]) / den;
        gnums[t] = in.gy[at(t)] / den;
        gdens[t] = -gnums[t] * out.y[at(t)];
        out.gk[at(t)] = (gnums[t] * in.v[at(t)] + gdens[t]) * now;
        out.gv[at(t)] = gnums[t] * now;
        out.gu[c] += out.gk[at(t)];
      }
      for (const int side : {0, 1}) {
        double gnum = 0, gden = 0;  // of the sums behind the step
        for (int64_t n = p.T - 1; n >= 0; --n) {
          const int64_t t = side == 0 ? n : p.T - 1 - n;
          const double weight = std::exp(in.k[at(t)]);
          out.gk[at(t)] += (gnum * in.v[at(t)] + gden) * weight;
          out.gv[at(t)] += gnum * weight;
          out.g_log_decay[c] += (gnum * nums[side][t] + gden * dens[side][t]) * decay;
          gnum = gnum * decay + gnums[t];
          gden = gden * decay + gdens[t];
        }
      }
    }
  }
  return out;
}

int failures = 0;

// Relative to the largest element, or to `least` where sums of larger terms cancel.
void compare(const std::string& what, const Values& found, const Values& expected, double allowed, double least = 0) {
  double largest = least, worst = 0;
  for (double value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(found[i] - expected[i]) / largest;
    if (!(error <= worst)) worst = error;  // NaN is worse than anything
  }
  if (worst <= allowed) return;
  ++failures;
  std::printf("WRONG %s: off by %.2e of the largest element, allowed %.2e\n", what.c_str(), worst, allowed);
}

// ---- the kernels ----

template <class Element>
class Kernels {
  using Real = wkv::RealOf<wkv::kTypeOf<Element>>;
  static constexpr DType kType = wkv::kTypeOf<Element>;
  static constexpr DType kParameters = sizeof(Real) == 8 ? DType::float64 : DType::float32;
  // Roundings of some hundred steps at keys of a few, and one more to the type of the element.
  static constexpr double kUnit = sizeof(Real) == 8 ? 1e-16 : 6e-8;
  static constexpr double kElement = sizeof(Element) == 2 ? (kType == DType::float16 ? 5e-4 : 4e-3) : kUnit;

 public:
  Kernels(Problem problem, Device& device) : p(problem), device(device), given(draw(problem)) {
    in = {w.values, u.values, k.values, v.values, state.values, gy.values, gstate_out.values, r.values};
    boundaries.write(boundaries_of(p));
  }

  // A plan for `limits`, which may be those of a smaller device. Mixing has a gate, and the sequences of the batch as
  // packed ones, which in memory are the same.
  void run(const std::string& name, const wkv::DeviceLimits& limits, bool mixing) {
    const int64_t B = mixing ? 1 : p.B, T = mixing ? p.B * p.T : p.T;
    const wkv::SequenceParams common = {.parameters = parameters(),
                                        .B = static_cast<uint32_t>(B),
                                        .T = static_cast<uint32_t>(T),
                                        .C = static_cast<uint32_t>(p.C),
                                        .N = static_cast<uint32_t>(p.B),
                                        .boundaries = {mixing ? boundaries.get() : nullptr, false},
                                        .inputs = {sequence(k), sequence(v), sequence(gy)},
                                        .r = mixing ? sequence(r) : wkv::Sequence{},
                                        .state = state.memory.get()};
    const Output<Element> y(p.B * p.T * p.C);
    const Output<Real> state_out(p.B * 3 * p.C);
    const int64_t rows =
        mixing ? wkv::packed_row(T, p.B, wkv::checkpoint_interval(kType)) : p.B * wkv::checkpoint_count(kType, p.T);
    const Output<Real> checkpoints(rows * 3 * p.C);
    for (const bool checkpoint : {false, true}) {
      const Planned planned(*this, mixing ? Operation::mixing_forward : Operation::forward, limits);
      wkv::SequenceParams params = common;
      params.outputs[0] = y.memory.get();
      params.checkpoints = checkpoint ? checkpoints.memory.get() : nullptr;
      params.state_out = state_out.memory.get();
      params.chunking = planned.chunking();
      device.run(Launches{planned.launch(mixing ? Kernel::mixing_forward : Kernel::forward, params)});
    }
    const Values final_state = state_out.values();
    Values max_out;
    for (int64_t b = 0; b < p.B; ++b) {
      const double* max = final_state.data() + (b * 3 + 2) * p.C;
      max_out.insert(max_out.end(), max, max + p.C);
    }
    Inputs gated = in;
    for (size_t i = 0; mixing && i < gated.gy.size(); ++i) gated.gy[i] *= gate_of(in.r[i]);
    Expected expected = solve(p, gated, max_out);
    Values of_gate = expected.y;
    for (size_t i = 0; i < of_gate.size(); ++i) of_gate[i] *= gated.gy[i] * gate_of(-in.r[i]);
    for (size_t i = 0; mixing && i < of_gate.size(); ++i) expected.y[i] *= gate_of(in.r[i]);
    compare(name + " y", y.values(), expected.y, kAllowed + kElement);
    compare(name + " state", comparable(final_state), expected.state, kAllowed);

    const Output<Element> gk(p.B * p.T * p.C), gv(p.B * p.T * p.C), gr(p.B * p.T * p.C);
    const Output<Real> gw(p.C), gu(p.C), gstate(p.B * 3 * p.C);
    const Planned planned(*this, mixing ? Operation::mixing_backward : Operation::backward, limits);
    wkv::SequenceParams params = common;
    params.outputs[0] = gk.memory.get();
    params.outputs[1] = gv.memory.get();
    params.gr = mixing ? gr.memory.get() : nullptr;
    params.checkpoints = checkpoints.memory.get();
    params.state_out = gstate.memory.get();
    params.gstate_out = gstate_out.memory.get();
    params.partials = planned.partials();
    params.chunking = planned.chunking();
    device.run(Launches{planned.launch(mixing ? Kernel::mixing_backward : Kernel::backward, params)});
    reduce({.parameters = parameters(),
            .C = p.C,
            .partials = planned.partials(),
            .rows = planned.plan.partial_bytes / (2 * p.C * static_cast<int64_t>(sizeof(Real))),
            .gw = gw.memory.get(),
            .gu = gu.memory.get()});
    // A gradient of k is made of terms of the size of gy v, even where they cancel.
    const double terms = 4;
    compare(name + " gk", gk.values(), expected.gk, kAllowed + kElement, terms);
    compare(name + " gv", gv.values(), expected.gv, kAllowed + kElement, terms);
    if (mixing) compare(name + " gr", gr.values(), of_gate, kAllowed + kElement, terms);
    compare(name + " gw", gw.values(), expected.gw, kAllowed, terms);
    compare(name + " gu", gu.values(), expected.gu, kAllowed, terms);
    compare(name + " gstate", gstate.values(), expected.gstate, kAllowed, terms);
    if (!mixing) run_summaries(name, limits, common, checkpoints);
  }

  // Of the sequences of the batch, the adjoints with a gate; the checkpoints are those of a forward without one.
  void run_summaries(const std::string& name, const wkv::DeviceLimits& limits, wkv::SequenceParams params,
                     const Output<Real>& checkpoints) {
    const Output<Real> own(p.B * 3 * p.C), adjoint(p.B * 2 * p.C);
    const Planned of_adjoint(*this, Operation::adjoint_summary, limits), of_own(*this, Operation::summary, limits);
    params.r = sequence(r);
    params.checkpoints = checkpoints.memory.get();
    params.state_out = adjoint.memory.get();
    params.chunking = of_adjoint.chunking();
    device.run(Launches{of_adjoint.launch(Kernel::adjoint_summary, params)});
    params.state = nullptr;
    params.checkpoints = nullptr;
    params.state_out = own.memory.get();
    params.chunking = of_own.chunking();
    device.run(Launches{of_own.launch(Kernel::summary, params)});

    Inputs alone = in;
    for (size_t i = 0; i < alone.gy.size(); ++i) alone.gy[i] *= gate_of(in.r[i]);
    std::fill(alone.gstate_out.begin(), alone.gstate_out.end(), 0.0);
    const Values gstate = solve(p, alone, Values(p.B * p.C)).gstate;
    Values expected;
    for (int64_t b = 0; b < p.B; ++b) {
      expected.insert(expected.end(), gstate.begin() + b * 3 * p.C, gstate.begin() + (b * 3 + 2) * p.C);
    }
    compare(name + " adjoint summary", adjoint.values(), expected, kAllowed, 4);
    std::fill(alone.state.begin(), alone.state.end(), 0.0);
    compare(name + " summary", comparable(own.values()), solve(p, alone, {}).state, kAllowed);
  }

  // Both directions, with a gate and packed as `run` does: a table of the intervals' sums, joined, and the read of it.
  void run_both_directions(bool mixing) {
    const bool is_double = kType == DType::float64;
    const int64_t T = mixing ? p.B * p.T : p.T, of_all = p.B * p.T * p.C;
    const int64_t intervals = mixing ? wkv::packed_row(T, p.B, wkv::checkpoint_interval(kType))
                                     : wkv::checkpoint_count(kType, p.T),
                  rows = mixing ? intervals : p.B * intervals;
    const Output<Element> y(of_all), gk(of_all), gv(of_all), gr(of_all);
    const Output<Real> g_log_decay(p.C), gu(p.C), checkpoints(rows * 6 * p.C), adjoints(rows * 6 * p.C);
    const Output<Real> partials((is_double ? p.B : rows) * 2 * p.C), steps(is_double ? of_all * 6 : 0);
    Values of_decays;
    for (const double raw : w.values) of_decays.push_back(-std::exp(raw));
    const Input<Real> log_decay(of_decays);
    wkv::BiParams params = {};
    params.parameters = {log_decay.memory.get(), u.memory.get(), kParameters, kParameters};
    params.B = static_cast<uint32_t>(mixing ? 1 : p.B);
    params.T = static_cast<uint32_t>(T);
    params.C = static_cast<uint32_t>(p.C);
    params.N = static_cast<uint32_t>(p.B);
    if (mixing) params.boundaries = {boundaries.get(), false};
    if (mixing) params.r = sequence(r);
    params.inputs[0] = sequence(k);
    params.inputs[1] = sequence(v);
    params.checkpoints = checkpoints.memory.get();
    params.rows = static_cast<uint32_t>(rows);
    params.chunking.chunks = static_cast<uint32_t>(intervals);
    params.chunking.log2_packed_steps = std::countr_zero(static_cast<uint64_t>(wkv::checkpoint_interval(kType)));
    params.steps = steps.memory.get();
    const auto launch = [&](Kernel kernel, int inputs, int of_thread) {
      wkv::Launch launch = {kernel, kType, {1, 1, 1}, wkv::kDoubleThreads, 0, &params, sizeof params};
      if (is_double) {
        launch.grid.x = blocks_for(p.C, wkv::kDoubleThreads);
        launch.grid.y = params.N;
      } else {
        launch.grid.x = blocks_for(p.C, wkv::kTileChannels);
        launch.grid.y = params.rows;
        launch.threads = wkv::bi_warps(of_thread) * wkv::kWarpThreads;
        launch.shared_bytes = wkv::bi_shared_bytes(kType, inputs, of_thread);
      }
      device.run(Launches{launch});
    };
    const auto join = [&](bool of_adjoints) {
      if (is_double) return;
      params.joins_adjoints = of_adjoints;
      const unsigned blocks = blocks_for(2 * p.B * ((p.C + 1) / 2), wkv::kPlainThreads);
      device.run(Launches{{Kernel::bi_join, kType, {blocks, 1, 1}, wkv::kPlainThreads, 0, &params, sizeof params}});
    };

    params.step_height = 3;
    params.outputs[0] = y.memory.get();
    launch(Kernel::bi_sums, 2, wkv::bi_sums_steps(kType));
    join(false);
    launch(Kernel::bi_forward, 2, wkv::bi_steps(kType));
    params.step_height = 6;
    params.inputs[2] = sequence(gy);
    params.outputs[0] = gk.memory.get();
    params.outputs[1] = gv.memory.get();
    params.gr = mixing ? gr.memory.get() : nullptr;
    params.adjoints = adjoints.memory.get();
    params.partials = partials.memory.get();
    if (is_double) launch(Kernel::bi_sums, 2, wkv::bi_sums_steps(kType));
    launch(Kernel::bi_adjoint_sums, 3, wkv::bi_steps(kType));
    join(true);
    launch(Kernel::bi_backward, 3, wkv::kBiBackwardSteps);
    reduce({.parameters = params.parameters,
            .is_raw = false,
            .C = p.C,
            .partials = partials.memory.get(),
            .rows = partials.count / (2 * p.C),
            .gw = g_log_decay.memory.get(),
            .gu = gu.memory.get()});

    Inputs gated = in;
    for (size_t i = 0; mixing && i < gated.gy.size(); ++i) gated.gy[i] *= gate_of(in.r[i]);
    BiExpected expected = solve_both_directions(p, gated);
    Values of_gate = expected.y;
    for (size_t i = 0; i < of_gate.size(); ++i) of_gate[i] *= gated.gy[i] * gate_of(-in.r[i]);
    for (size_t i = 0; mixing && i < of_gate.size(); ++i) expected.y[i] *= gate_of(in.r[i]);
    const std::string name = mixing ? "both directions, mixing" : "both directions";
    const double terms = 4;  // as in `run`
    compare(name + " y", y.values(), expected.y, kAllowed + kElement);
    compare(name + " gk", gk.values(), expected.gk, kAllowed + kElement, terms);
    compare(name + " gv", gv.values(), expected.gv, kAllowed + kElement, terms);
    if (mixing) compare(name + " gr", gr.values(), of_gate, kAllowed + kElement, terms);
    compare(name + " g_log_decay", g_log_decay.values(), expected.g_log_decay, kAllowed, terms);
    compare(name + " gu", gu.values(), expected.gu, kAllowed, terms);
  }

  // A token for each sequence, the first of k and v, with a gate and without.
  void step() {
    for (const bool gated : {false, true}) {
      const Input<Real> moved(in.state);
      const Output<Element> y(p.B * p.C);
      const int64_t stride = p.T * p.C;
      const wkv::StepParams params = {.parameters = parameters(),
                                      .B = p.B,
                                      .C = p.C,
                                      .k = k.memory.get(),
                                      .v = v.memory.get(),
                                      .r = gated ? r.memory.get() : nullptr,
                                      .k_stride = stride,
                                      .v_stride = stride,
                                      .r_stride = stride,
                                      .y = y.memory.get(),
                                      .state = moved.memory.get(),
                                      .state_batch_stride = 3 * p.C,
                                      .state_row_stride = p.C,
                                      .state_channel_stride = 1};
      device.run(Launches{{.kernel = Kernel::step,
                           .dtype = kType,
                           .grid = {blocks_for(p.B * p.C, wkv::kPlainThreads), 1, 1},
                           .threads = wkv::kPlainThreads,
                           .shared_bytes = 0,
                           .params = &params,
                           .params_bytes = sizeof params}});
      Inputs first = in;
      Values expected;
      first.k = first.v = {};
      for (int64_t i = 0; i < p.B * p.C; ++i) {
        first.k.push_back(in.k[i / p.C * stride + i % p.C]);
        first.v.push_back(in.v[i / p.C * stride + i % p.C]);
      }
      expected = solve({p.B, 1, p.C}, first, {}).y;
      for (size_t i = 0; gated && i < expected.size(); ++i) {
        expected[i] *= gate_of(in.r[i / p.C * stride + i % p.C]);
      }
      compare(gated ? "step with r" : "step", y.values(), expected, kAllowed + kElement);
    }
  }

  int plans_of_chunks = 0, plans_of_several_tiles = 0;

 private:
  static constexpr double kAllowed = 300 * kUnit;

  // num / den, and log of den · e^max, which do not depend on the gauge.
  Values comparable(const Values& states) const {
    Values result;
    for (int64_t b = 0; b < p.B; ++b) {
      const double* num = states.data() + b * 3 * p.C;
      const double *den = num + p.C, *max = den + p.C;
      for (int64_t c = 0; c < p.C; ++c) result.push_back(num[c] / den[c]);
      for (int64_t c = 0; c < p.C; ++c) result.push_back(std::log(den[c]) + max[c]);
    }
    return result;
  }

  static double gate_of(double r) { return 1 / (1 + std::exp(-r)); }

  // Keys and values from N(0, 1), decays from e^-0.05 to e^-3.
  static Inputs draw(const Problem& p) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    const auto values = [&](int64_t count, double scale = 1) {
      Values result;
      for (int64_t i = 0; i < count; ++i) result.push_back(scale * normal(random));
      return result;
    };
    Inputs in = {values(p.C),
                 values(p.C),
                 values(p.B * p.T * p.C),
                 values(p.B * p.T * p.C),
                 values(p.B * 3 * p.C),
                 values(p.B * p.T * p.C),
                 values(p.B * 3 * p.C),
                 values(p.B * p.T * p.C)};
    for (int64_t c = 0; c < p.C; ++c) in.w[c] = -3 + 4.0 * static_cast<double>(c) / static_cast<double>(p.C);
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t c = 0; c < p.C; ++c) {
        double& den = in.state[(b * 3 + 1) * p.C + c];
        den = std::exp(den);
      }
    }
    return in;
  }

  // A plan, its memory, and its launch, as csrc/gpu/op.h makes them of tensors.
  struct Planned {
    wkv::Plan plan;
    bool is_packed;
    int64_t B, partial_bytes;
    Memory workspace;

    Planned(Kernels& kernels, Operation operation, const wkv::DeviceLimits& limits)
        : plan(plan_of(kernels.p, operation, limits)),
          is_packed(packs(operation)),
          B(kernels.p.B),
          partial_bytes((plan.partial_bytes + 7) / 8 * 8),
          workspace(partial_bytes + plan.exchange_bytes) {
      kernels.plans_of_chunks += plan.chunks > 1;
      kernels.plans_of_several_tiles += plan.chunks > 1 && plan.chunk_tiles > 1;
      if (plan.chunks == 1) return;
      check(cudaMemsetAsync(exchange(), 0xff, static_cast<size_t>(plan.exchange_bytes), kernels.device.stream()),
            "cudaMemsetAsync");
    }
    static bool packs(Operation operation) {
      return operation == Operation::mixing_forward || operation == Operation::mixing_backward;
    }
    static wkv::Plan plan_of(const Problem& p, Operation operation, const wkv::DeviceLimits& limits) {
      return packs(operation) ? make_packed_plan(operation, kType, p.B, p.B * p.T, p.C, limits)
                              : make_plan(operation, kType, p.B, p.T, p.C, limits);
    }
    void* partials() const { return workspace.get(); }
    char* exchange() const { return static_cast<char*>(workspace.get()) + partial_bytes; }
    wkv::Chunking chunking() const { return chunking_of(plan, is_packed ? 1 : B, exchange()); }
    wkv::Launch launch(Kernel kernel, const wkv::SequenceParams& params) const {
      const auto channels = static_cast<unsigned>(plan.channel_tiles), chunks = static_cast<unsigned>(plan.chunks);
      wkv::Launch launch = {.kernel = kernel,
                            .dtype = kType,
                            .grid = {channels, static_cast<unsigned>(B), chunks},
                            .threads = plan.threads,
                            .shared_bytes = plan.shared_bytes,
                            .params = &params,
                            .params_bytes = sizeof params};
      if (is_packed && kType != DType::float64) launch.grid = {channels, chunks, 1};
      return launch;
    }
  };

  void reduce(const wkv::ReduceParams& params) {
    constexpr int kThreads = wkv::kReduceLanes * wkv::kReduceGroups;
    device.run(Launches{{.kernel = Kernel::reduce,
                         .dtype = kType,
                         .grid = {blocks_for(p.C, wkv::kReduceLanes), 1, 1},
                         .threads = kThreads,
                         .shared_bytes = kThreads * 2 * static_cast<int>(sizeof(double)),
                         .params = &params,
                         .params_bytes = sizeof params}});
  }

  static unsigned blocks_for(int64_t count, int of_block) {
    return static_cast<unsigned>((count + of_block - 1) / of_block);
  }

  wkv::ChannelParameters parameters() const { return {w.memory.get(), u.memory.get(), kParameters, kParameters}; }
  wkv::Sequence sequence(const Input<Element>& tensor) const { return {tensor.memory.get(), p.T * p.C, p.C}; }

  // [0, T, 2 T ...]
  static std::vector<int32_t> boundaries_of(const Problem& p) {
    std::vector<int32_t> result;
    for (int64_t n = 0; n <= p.B; ++n) result.push_back(static_cast<int32_t>(n * p.T));
    return result;
  }

  Problem p;
  Device& device;
  Inputs given, in;
  Memory boundaries{(p.B + 1) * static_cast<int64_t>(sizeof(int32_t))};
  Input<Real> w{given.w}, u{given.u}, state{given.state}, gstate_out{given.gstate_out};
  Input<Element> k{given.k}, v{given.v}, gy{given.gy}, r{given.r};
};

template <class Element>
void run_all(const char* dtype, Device& device) {
  // On one multiprocessor a few columns are many, and chunks may have several tiles; with little shared memory forward
  // has tiles of one warp.
  wkv::DeviceLimits one = device.limits, small = device.limits;
  one.multiprocessors = small.multiprocessors = 1;
  small.shared_per_multiprocessor = 1;
  int plans_of_chunks = 0, plans_of_several_tiles = 0;
  // Rows that vectors can move, rows that they cannot, and one step; more chunks than from an anchor to the next; and
  // more sequences.
  for (const Problem& p :
       {Problem{2, 200, 128}, Problem{3, 131, 77}, Problem{1, 1, 5}, Problem{1, 1300, 64}, Problem{16, 260, 20}}) {
    Kernels<Element> kernels(p, device);
    for (const bool mixing : {false, true}) {
      const std::string of = mixing ? " mixing" : "";
      kernels.run("this device" + of, device.limits, mixing);
      kernels.run("one multiprocessor" + of, one, mixing);
      kernels.run("small tiles" + of, small, mixing);
      kernels.run_both_directions(mixing);
    }
    kernels.step();
    plans_of_chunks += kernels.plans_of_chunks;
    plans_of_several_tiles += kernels.plans_of_several_tiles;
  }
  std::printf("%s: done, %d plans with several chunks, %d of them of several tiles\n", dtype, plans_of_chunks,
              plans_of_several_tiles);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no CUDA device: %s\n", cudaGetErrorString(error));
    return 2;
  }
  const bool beside_a_hog = count > 1 && std::strcmp(arguments[1], "hog") == 0;
  Device device(beside_a_hog);
  run_all<float>("float32", device);
  run_all<wkv::Half>("float16", device);
  run_all<wkv::Bfloat16>("bfloat16", device);
  run_all<double>("float64", device);
  if (beside_a_hog) {
    std::printf("%d of %d calls were done before the hog was\n", device.done_before_the_hog, device.launches);
    failures += device.done_before_the_hog == 0;
  }
  std::printf("%s\n", failures == 0 ? "all right" : "WRONG");
  return failures == 0 ? 0 : 1;
}
