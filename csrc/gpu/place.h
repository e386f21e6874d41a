// Where a block's chunk lies: its sequence, and its place in the order of look-back.
//
// A block has a ticket, its turn among the chunks of its column. The sequences of a batch have a column each, in which
// tickets count the chunks. Packed sequences share one: their chunks lie one behind the other, in the rows that
// packed_row has for them, and a block finds its sequence in the boundaries. Nothing has checked those. Whatever they
// are, every address is inside the tensors, because each view is; and every wait terminates, because every block
// publishes a message in the place of its ticket and waits for those of earlier tickets alone.
#pragma once

#include "params.h"
#include "target.h"
#include "tuning.h"

namespace wkv {

// In the plain kernels, whose sequences are those of the grid.
template <bool kReverse, DType dtype, bool kMixing>
struct Place {
  static constexpr bool has_steps = true, is_listed = true, hands_on = false;
  uint32_t b;         // of the tensors [B, T, C]
  uint32_t position;  // of the chunk in the order of the scan

  Place() = default;
  WKV_HD Place(const SequenceParams& params, BlockIndex index, uint32_t ticket)
      : b(params.chunking.first_batch + index.y), position(ticket) {}

  // The ticket that the block takes if blocks start in their order.
  WKV_HD static uint32_t likely_ticket(const SequenceParams&, BlockIndex index) { return index.z; }
  WKV_HD static uint32_t column(const SequenceParams& params, BlockIndex index) {
    return (params.chunking.first_batch + index.y) * params.chunking.channel_tiles + index.x;
  }

  WKV_HD uint32_t ticket() const { return position; }
  WKV_HD uint32_t state_row() const { return b; }
  WKV_HD uint32_t begin() const { return 0; }
  WKV_HD uint32_t steps(const SequenceParams& params) const { return params.T; }
  WKV_HD uint32_t chunks(const SequenceParams& params) const { return params.chunking.chunks; }
  WKV_HD uint32_t checkpoint_row(const SequenceParams& params, uint32_t t) const {
    return wkv::checkpoint_row<uint32_t>(dtype, params.T, b, t);
  }
};

// In the mixing kernels, whose sequences are those of a batch or packed. A block has it in shared memory.
template <bool kReverse, DType dtype>
struct Place<kReverse, dtype, true> {
  uint32_t b;         // of the tensors [B, T, C], 0 where sequences are packed
  uint32_t position;  // of the chunk in the order of the scan
  bool is_listed;     // the ticket is one of a chunk: a grid may have a few blocks more
  bool has_steps;
  bool hands_on;  // the state of a sequence without steps

  Place() = default;
  WKV_HD Place(const SequenceParams& params, BlockIndex index, uint32_t ticket) : ticket_(ticket) {
    const Chunking& chunking = params.chunking;
    if (!is_packed(params)) {
      b = n_ = chunking.first_batch + index.y;
      view_ = view_of_batch<uint32_t>(dtype, params.T, b);
      chunks_ = chunking.chunks;
      position = ticket;
      is_listed = has_steps = true;
      hands_on = false;
      return;
    }
    b = 0;
    is_listed = ticket < chunking.chunks;
    const uint32_t row = kReverse ? chunking.chunks - 1 - ticket : ticket, log2 = chunking.log2_packed_steps;
    n_ = sequence_of(params, row);
    const uint32_t begin = boundary(params, n_), end = boundary(params, n_ + 1);
    view_ = {0, begin, end < begin ? 0 : end - begin, packed_row<uint32_t>(begin, n_, checkpoint_interval(dtype))};
    chunks_ = (view_.steps + (1u << log2) - 1) >> log2;
    const uint32_t chunk = row - first_row(params, begin, n_);
    has_steps = is_listed && chunk < chunks_;
    hands_on = is_listed && chunk == 0 && view_.steps == 0;
    position = kReverse ? chunks_ - 1 - chunk : chunk;
  }

  WKV_HD static uint32_t likely_ticket(const SequenceParams& params, BlockIndex index) {
    return is_packed(params) ? index.z * kPackedRows + index.y : index.z;
  }
  WKV_HD static uint32_t column(const SequenceParams& params, BlockIndex index) {
    const uint32_t b = is_packed(params) ? 0 : params.chunking.first_batch + index.y;
    return b * params.chunking.channel_tiles + index.x;
  }

  WKV_HD uint32_t ticket() const { return ticket_; }
  WKV_HD uint32_t state_row() const { return n_; }
  WKV_HD uint32_t begin() const { return view_.begin; }
  WKV_HD uint32_t steps(const SequenceParams&) const { return view_.steps; }
  WKV_HD uint32_t chunks(const SequenceParams&) const { return chunks_; }
  WKV_HD uint32_t checkpoint_row(const SequenceParams&, uint32_t t) const { return view_.checkpoint_row(dtype, t); }

 private:
  SequenceView<uint32_t> view_;
  uint32_t n_, ticket_, chunks_;

  WKV_HD static bool is_packed(const SequenceParams& params) { return params.boundaries.data != nullptr; }

  // In range; of 64 bits the lower half, which has all of a valid one.
  WKV_HD static uint32_t boundary(const SequenceParams& params, uint32_t n) {
    const uint32_t* const words = static_cast<const uint32_t*>(params.boundaries.data);
    const uint32_t step = load_constant(words + (uint64_t{n} << params.boundaries.is_wide));
    return step < params.T ? step : params.T;
  }

  // As packed_row has it for chunks, whose steps are a power of two: a division would take 20 instructions.
  WKV_HD static uint32_t first_row(const SequenceParams& params, uint32_t begin, uint32_t n) {
    return (begin >> params.chunking.log2_packed_steps) + n;
  }

  // The last sequence whose chunks begin in this row or before it; some sequence if boundaries do not rise.
  WKV_HD static uint32_t sequence_of(const SequenceParams& params, uint32_t row) {
    uint32_t first = 0;
#pragma unroll 1
    for (uint32_t count = params.N; count > 1;) {
      const uint32_t half = count / 2, n = first + half;
      const bool is_before = first_row(params, boundary(params, n), n) <= row;
      first = is_before ? n : first;
      count = is_before ? count - half : half;
    }
    return first;
  }
};

}  // namespace wkv
