// A thread's keys in registers, and whether the weights of a tile can share one exponent.
//
// With one reference for a tile, e^{k - reference} is the weight of a step in all sums of the tile, and decay being
// constant, what comes into a subchunk is added to its own sums after the walk: docs/wkv.md. Keys that spread too far for
// float32 take RunningScale, subchunk by subchunk.
#pragma once

#include "tile.h"

namespace wkv {

template <class Element>
struct Keys {
  Packed<Element> raw[kSubchunkSteps];
  Pair highest, lowest;  // of those that are not NaN, in units of log2

  WKV_HD Pair get(int step) const { return unpack(raw[step]); }

  WKV_HD void load(Column<Element> column, int steps) {
    Packed<Element> high, low;
    for_steps(steps, [&](int step) {
      raw[step] = column.at(step);
      high = step == 0 ? raw[0] : larger_of(high, raw[step]);
      low = step == 0 ? raw[0] : smaller_of(low, raw[step]);
    });
    // Where there is no key, or NaN alone, the bounds are finite and such that all fits.
    highest = lowest = Pair(0);
    if (kFullTilesOnly || steps > 0) {
      highest = larger(Pair(kEmptyExponent), unpack(high)) * Pair(kLog2E);
      lowest = smaller(Pair(-kEmptyExponent), unpack(low)) * Pair(kLog2E);
    } else {
      highest = Pair(kEmptyExponent);
      lowest = Pair(-kEmptyExponent);
    }
  }

  // For RunningScale. Whether there were any.
  WKV_HD bool replace_infinite(int steps) {
    if (all(highest < Pair(INFINITY))) return false;
    for_steps(steps, [&](int step) {
      const Pair logit = key_logit(get(step));
      raw[step] = pack<Element>({logit.x, logit.y});
    });
    return true;
  }
};

// The largest of what the warps of a tile put into their rows, as a whole exponent.
WKV_HD Pair reference_of(Rows64 first_warp, int stride, int warps, int lane) {
  Pair highest = first_warp.get(0, lane);
#pragma unroll 1
  for (int warp = 1; warp < warps; ++warp) highest = larger(highest, first_warp.get(warp * stride, lane));
  return ceil(highest);
}

// Weights relative to a whole exponent that all steps of a tile share.
struct TileScale {
  Pair reference;

  WKV_HD Pair weight(Pair key) const { return exp2(key * Pair(kLog2E) - reference); }
};

// The smallest weight that a step reads with, in units of log2: |u|, because the bonus may lift or lower it, and u once
// more where it is positive, because it lifts as well what is held at the smallest float. NaN makes NaN.
WKV_HD Pair least_weight(Pair lowest, Pair bonus) {
  const Pair u = log2(bonus);
  return lowest - abs(u) - larger(u, Pair(0));
}

// Sums may be so small, in units of log2, and keep float32's precision: 24 bits below there is the smallest normal number,
// 2^-126.
inline constexpr double kLeastSum = -102.0;

// Of a tile; what comes in may be larger, up to kLeastSum.
WKV_HD bool tile_fits(Pair reference, Pair least) {
  return all(reference - least <= Pair(kSharedSpread * kLog2E));
}

WKV_HD RunningScale<Pair> running_scale(Channel<Pair> channel, const SharedChannels& channels, int lane) {
  return {channel, warp_agrees(all(channel.is_moderate())), channels.bonus(lane) * channels.decay(lane)};
}

// A lane's channels with u, which shared memory has no room for.
WKV_HD Channel<Pair> channel_of(const ChannelParameters& parameters, int64_t c, int count, Pair log_decay) {
  const auto u = [&](int i) {
    return i < count ? load_parameter<float>(parameters.u, parameters.u_dtype, c + i) : 0.0f;
  };
  return {log_decay, {u(0), u(1)}};
}

}  // namespace wkv
