// ItemShard: one rank's items of a retrieval table, projected, in fixed memory. Put and Erase may
// run while other threads search: a search holds the shard for reading and sees every item as it
// was before or after an update, never between. What an item is stored as does not depend on when
// or where it came: an updated row has the bits of a rebuilt one.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/mol_ops.h"
#include "models/mol_model.h"
#include "runtime/retrieval_filter.h"

namespace trireme {

struct ItemShardOptions {
  MolStorage storage = MolStorage::kF32;
  int64_t capacity = 0;  // items this shard can hold
  bool means = false;    // hold each item's mean component for the first stage "average"
  std::vector<std::string> attributes;
  int sharing = 1;  // shards in the same memory: of ranks on one host, where that is the host's
};

// Bytes of a shard by owner, for the report of what does not fit.
struct ItemShardBytes {
  int64_t items = 0;  // components, scales, gates, means
  int64_t ids = 0;    // ids, places in the order, the index from id to slot
  int64_t attributes = 0;
  int64_t projection = 0;  // what Put works in, however many items there are
  int64_t table() const { return items + ids + attributes; }
  int64_t total() const { return table() + projection; }
};

class ItemShard {
 public:
  // `host_memory`: the device is a CPU.
  static ItemShardBytes PlanBytes(const MolModel& model, const ItemShardOptions& options,
                                  bool host_memory);
  // ResourceExhausted with the bytes by owner when the device lacks the memory.
  static absl::StatusOr<std::unique_ptr<ItemShard>> Create(const MolModel& model, Stream& stream,
                                                           ItemShardOptions options);

  struct Items {
    const float* embeddings = nullptr;     // [n, D_x]
    const int64_t* ids = nullptr;          // [n], distinct
    const uint32_t* order = nullptr;       // [n], of new items
    const uint64_t* attributes = nullptr;  // [n, attribute_words()]; null: none set
    int64_t count = 0;
  };
  // New items take free slots (REQUIRES: enough of them), known ids are replaced and keep their
  // place in the order. An item that is not finite, or projects to something that is not, is kept
  // but never answered; gives how many those were. Takes no memory of the device: calls of several
  // threads work one after the other in what Create reserved. An error is the stream's: items from
  // the one that met it on may be missing or hold anything.
  absl::StatusOr<int64_t> Put(Stream& stream, const Items& items);
  // False when there is no such item.
  bool Erase(int64_t id);
  std::optional<int32_t> Find(int64_t id) const;

  int64_t size() const;
  int64_t free_slots() const { return options_.capacity - size(); }
  int64_t not_finite() const;  // items that are never answered
  const ItemShardOptions& options() const { return options_; }
  int64_t attribute_words() const {
    return static_cast<int64_t>(options_.attributes.size() + 63) / 64;
  }
  const MolModel& model() const { return model_; }
  const ItemShardBytes& bytes() const { return bytes_; }
  // What it holds of the device's memory: items, their places in the order, what Put works in.
  int64_t device_bytes() const {
    return bytes_.items + bytes_.projection + slots_ * static_cast<int64_t>(sizeof(uint32_t));
  }

  // Hold one while using what follows.
  std::shared_lock<std::shared_mutex> ReadLock() const {
    return std::shared_lock<std::shared_mutex>(mutex_);
  }
  MolTableView view() const;
  int64_t mask_words() const { return slots_ / kMolBlockRows; }
  // Bit b of word w: slot 32 w + b may be answered, passes the filter and, if `rows` is there, has
  // a place in the order whose bit is set in it.
  void FillMask(const Filter& filter, const std::vector<uint32_t>* rows, int32_t* words) const;
  int64_t IdOfSlot(int32_t slot) const { return ids_[slot]; }

  // A row as a snapshot holds it: id, place, flags, attribute words, then vectors, scales and gate
  // as stored. Fixed size for given options.
  int64_t row_bytes() const;
  // All rows, by slot.
  std::vector<int32_t> OccupiedSlots() const;
  // The block of the table that rows come from or go to, as the host sees it: the device's memory
  // itself, or a copy where the host cannot read that.
  class BlockWindow {
   public:
    BlockWindow(const ItemShard& shard, Stream& stream);
    // Puts imported rows into the table; after the last of them.
    absl::Status Flush();

   private:
    friend class ItemShard;
    struct Part {
      char* base;                      // of all blocks, on the device
      int64_t vectors, values, piece;  // of a slot, of a vector, side by side (MolPlace)
      int64_t element;                 // bytes of a value
      char* host;
      int64_t block_bytes() const { return vectors * values * element * kMolBlockRows; }
    };
    // An error of the stream: what the host sees is no block of the table.
    absl::Status MoveTo(int64_t block);

    const ItemShard& shard_;
    Stream& stream_;
    std::vector<Part> parts_;
    std::vector<char> copy_;
    int64_t block_ = -1;
    bool written_ = false;
  };
  // Errors of these two are the stream's.
  absl::Status ExportRow(BlockWindow& window, int32_t slot, char* out) const;
  // REQUIRES: a free slot. False when an item of this id is there already.
  absl::StatusOr<bool> ImportRow(BlockWindow& window, const char* row);

 private:
  struct SlotHash {
    using is_transparent = void;
    const std::vector<int64_t>* ids;
    size_t operator()(int32_t slot) const { return (*this)((*ids)[slot]); }
    size_t operator()(int64_t id) const { return absl::Hash<int64_t>()(id); }
  };
  struct SlotEqual {
    using is_transparent = void;
    const std::vector<int64_t>* ids;
    bool operator()(int32_t a, int32_t b) const { return a == b; }
    bool operator()(int32_t a, int64_t id) const { return (*ids)[a] == id; }
    bool operator()(int64_t id, int32_t b) const { return (*ids)[b] == id; }
  };

  ItemShard(const MolModel& model, ItemShardOptions options, const ItemShardBytes& bytes);
  absl::Status AllocateMemory(Device& device);
  // Items that projection_ has room for.
  absl::StatusOr<int64_t> PutChunk(Stream& stream, const Items& chunk);
  struct Projected;
  // Gives them slots, places and attributes; returns how many are not finite.
  int64_t EnterChunk(Stream& stream, const Items& chunk, const Projected& projected,
                     std::vector<int32_t>* slots);
  int32_t TakeSlot(int64_t id);
  void SetAttributes(int32_t slot, const uint64_t* words);
  // Calls visit(pointer to a lane's element, bytes of it) for everything stored of a slot.
  template <typename Visit>
  static absl::Status ForEachElement(BlockWindow& window, int32_t slot, Visit&& visit);
  // Takes places of slots [begin, end) over to the device, where it has a copy of its own.
  void CopyOrder(Stream& stream, int64_t begin, int64_t end) const;

  const MolModel& model_;
  const ItemShardOptions options_;
  const ItemShardBytes bytes_;
  int64_t slots_ = 0;  // capacity, rounded up to whole blocks
  Buffer components_, scales_, gates_, gate_scales_, means_, mean_scales_, order_memory_;
  std::vector<uint32_t> host_order_;  // where the host cannot read the device's
  uint32_t* order_ = nullptr;         // the host's view
  std::vector<int64_t> ids_;
  std::vector<uint32_t> valid_;                // [slots / 32]
  std::vector<std::vector<uint32_t>> planes_;  // [attributes][slots / 32]
  std::vector<int32_t> freed_;
  int32_t never_used_ = 0;  // slots from here on
  int64_t not_finite_ = 0;
  absl::flat_hash_set<int32_t, SlotHash, SlotEqual> index_;  // id -> slot: 1 + 4 bytes an entry
  std::vector<bool> finite_;
  mutable std::shared_mutex mutex_;
  std::mutex projection_mutex_;  // taken before mutex_
  Arena projection_;             // by projection_mutex_
  std::vector<float> zeros_;     // a row of nothing
};

}  // namespace trireme
