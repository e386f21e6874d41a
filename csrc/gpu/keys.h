// A thread's keys in registers, and whether the weights of a tile can share one exponent.
//
// With one reference for a tile, e^{k - reference} is the weight of a step in all sums of the tile, and decay being
// constant, the state before a subchunk is added to its own sums afterwards: docs/wkv.md. Keys that spread too far
// for float32 take RunningScale, subchunk by subchunk.
#pragma once

#include "tile.h"

namespace wkv {

template <class Element, int kSteps>
struct Keys {
  Packed<Element> raw[kSteps];
  Pair highest, lowest;  // of those that are not NaN, in units of log2

  WKV_HD Pair get(int step) const { return unpack(raw[step]); }

  WKV_HD void load(Column<Element> column, int steps) {
    clear_unless_full(steps, raw);
    Packed<Element> high{}, low{};
    for_steps<kSteps>(steps, [&](int step) {
      raw[step] = column.at(step);
      high = step == 0 ? raw[0] : larger_of(high, raw[step]);
      low = step == 0 ? raw[0] : smaller_of(low, raw[step]);
    });
    // Without a key, or with NaN alone, the bounds are finite and every tile fits.
    highest = lowest = Pair(0);
    if (kFullTilesOnly || steps > 0) {
      highest = larger(Pair(kEmptyExponent), unpack(high)) * Pair(kLog2E);
      lowest = smaller(Pair(-kEmptyExponent), unpack(low)) * Pair(kLog2E);
    } else {
      highest = Pair(kEmptyExponent);
      lowest = Pair(-kEmptyExponent);
    }
  }

  // Replaces keys by their logits if the range contains +inf, so that no step with RunningScale needs a check.
  WKV_HD void replace_infinite(int steps) {
    if (all(highest < Pair(INFINITY))) return;
    for_steps<kSteps>(steps, [&](int step) {
      const Pair logit = key_logit(get(step));
      raw[step] = pack<Element>({logit.x, logit.y});
    });
  }
};

// The logit of a step at the end of the subchunk. In a whole subchunk the number of steps after it is a constant.
template <int kSteps>
WKV_HD Pair logit_at_end(Pair key, Pair log_decay, int step, int steps) {
  return Pair((steps == kSteps ? kSteps - 1 : steps - 1) - step) * log_decay + key;
}

// The sum of steps whose keys spread, `left(step)` being their logits at the end. Each weight is relative to the
// largest: it is at most 1, and one that underflows is negligible.
template <int kSteps, class Element, class Left>
WKV_HD Scaled sum_of_spread(const Left& left, Column<Element> v, int steps) {
  State<Pair> state = empty_state<Pair>();
  for_steps<kSteps>(steps, [&](int step) { state.max = larger(left(step), state.max); });
  const Pair max_log2 = state.max * Pair(kLog2E);
  for_steps<kSteps>(steps, [&](int step) {
    const Pair weight = exp2(fused(left(step), Pair(kLog2E), -max_log2));
    state.sums = {weight * v.get(step) + state.sums.num, state.sums.den + weight};
  });
  return scaled(state);
}

// The largest of the values in the warps' rows, `stride` apart, rounded up to a whole exponent.
WKV_HD Pair reference_of(Rows64 first_warp, int stride, int warps, int lane) {
  Pair highest = first_warp.get(0, lane);
#pragma unroll 1
  for (int warp = 1; warp < warps; ++warp) highest = larger(highest, first_warp.get(warp * stride, lane));
  return ceil(highest);
}

WKV_HD Pair weight_of(Pair key, Pair reference) { return exp2(fused(key, Pair(kLog2E), -reference)); }

// The weights of a tile fit in one scale. The keys may spread by e^40, and the bonus e^u lower that by e^20 or lift it
// by e^10: it lifts as well what is held at the smallest float, and counts twice. Together that is kSharedSpread. A
// bonus of NaN does not fit, and a key of NaN may.
WKV_HD bool tile_fits(Pair reference, Pair lowest, Pair bonus) {
  constexpr double kSpread = 57.7, kLeastBonus = 2.06e-9, kLargestBonus = 2.2e4;
  static_assert(kSpread <= (kSharedSpread - 20) * kLog2E);
  return all(reference - lowest <= Pair(kSpread)) && all(Pair(kLeastBonus) <= bonus) &&
         all(bonus <= Pair(kLargestBonus));
}

// Log2 of the largest factor by which the state before a tile may exceed the tile's scale; the sums stay finite.
inline constexpr double kLargestIncoming = 60.0;

// Loads u from memory: shared memory has no room for it.
WKV_HD RunningScale<Pair> running_scale(const ChannelParameters& parameters, int64_t c, int count,
                                        const SharedChannels& channels, int lane) {
  const auto u = [&](int i) {
    return i < count ? load_parameter<float>(parameters.u, parameters.u_dtype, c + i) : 0.0f;
  };
  const Channel<Pair> channel{channels.log_decay(lane), {u(0), u(1)}};
  return {channel, warp_agrees(all(channel.is_moderate())), channels.bonus(lane) * channels.decay(lane)};
}

}  // namespace wkv
