// Decoupled look-back: the blocks of one launch pass states from chunk to chunk, in a single pass over the data.
//
// The blocks of a column take their chunks by tickets, in the order in which they start. Every wait terminates: a block
// waits only for blocks that took their tickets earlier, so that they run already, however few blocks the device holds.
// Every `anchor`-th chunk publishes the inclusive state, the sum of all chunks up to it; the others their partial, the
// sum of their own steps. A chunk joins the last anchor's state and the partials after it in the order of the chunks,
// not of arrival: the result is the same in every run.
#pragma once

#include "pair.h"
#include "params.h"
#include "tuning.h"

namespace wkv {

// A block's position among the chunks of its sequence, and the messages of its column.
struct LookBack {
  Word* messages;  // of the column, by tickets
  uint32_t ticket;
  int predecessors;  // that the chunk waits for
  bool has_successor, is_anchor;

  WKV_HD LookBack(const Chunking& chunking, uint32_t column, uint32_t position, uint32_t ticket) : ticket(ticket) {
    const uint32_t since_anchor = position & (chunking.anchor - 1);
    // 32 bits suffice: plan.h.
    const uint32_t words_of_column = (chunking.chunks - 1) * kWordsOfMessage;
    messages = static_cast<Word*>(chunking.messages) + static_cast<uint64_t>(column) * words_of_column;
    predecessors = static_cast<int>(position <= since_anchor ? position : since_anchor + 1);
    has_successor = ticket + 1 < chunking.chunks;
    is_anchor = since_anchor + 1 == chunking.anchor;
  }

  WKV_HD void publish(int lane, Scaled state) const {
    Word* message = message_of(ticket, lane);
    store_relaxed(message, word_of(state.sums.num));
    store_relaxed(message + kWarpThreads, word_of(state.sums.den));
    store_relaxed(message + 2 * kWarpThreads, word_of(state.exponent));
  }

  // Waits for the state that the i-th predecessor publishes.
  WKV_HD Scaled wait(int i, int lane) const {
    const Word* message = message_of(ticket - predecessors + i, lane);
    for (;;) {
      const Word num = load_relaxed(message), den = load_relaxed(message + kWarpThreads),
                 exponent = load_relaxed(message + 2 * kWarpThreads);
      if (is_written(num) && is_written(den) && is_written(exponent)) {
        return {{pair_of(num), pair_of(den)}, pair_of(exponent)};
      }
      pause_polling();
    }
  }

 private:
  static constexpr uint32_t kWordsOfMessage = 3 * kWarpThreads;

  WKV_HD Word* message_of(uint32_t i, int lane) const {
    return messages + (i * kWordsOfMessage + static_cast<uint32_t>(lane));
  }

  // The lower half shows whether a word is written. A NaN with all bits set is published without the last one, still a
  // NaN.
  WKV_HD static uint32_t published(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    return bits < kNothing - 1 ? bits : kNothing - 1;
  }
  WKV_HD static Word word_of(Pair pair) {
    return static_cast<Word>(bits_as<uint32_t>(pair.y)) << 32 | published(pair.x);
  }
  WKV_HD static Pair pair_of(Word word) {
    return {bits_as<float>(static_cast<uint32_t>(word)), bits_as<float>(static_cast<uint32_t>(word >> 32))};
  }
  WKV_HD static bool is_written(Word word) { return static_cast<uint32_t>(word) != kNothing; }
};

// The block's turn among those of its column; one thread takes it for the block.
WKV_HD uint32_t take_turn(const Chunking& chunking, uint32_t column) {
  return chunking.tickets == nullptr ? 0 : take_ticket(chunking.tickets + column);
}

}  // namespace wkv
