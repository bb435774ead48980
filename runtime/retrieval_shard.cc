#include "runtime/retrieval_shard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/retrieval_memory.h"

namespace trireme {
namespace {

// Items projected at a time: enough rows for the matmul, 4 MB of components at 8x4x64.
constexpr int64_t kChunkItems = 4096;

int64_t Slots(int64_t capacity) {
  return (capacity + kMolBlockRows - 1) / kMolBlockRows * kMolBlockRows;
}

// Never more than the table holds: ids are distinct.
int64_t ChunkItems(int64_t capacity) { return std::min(kChunkItems, Slots(capacity)); }

// What Put takes of its arena for `rows` items.
int64_t ProjectionBytes(const MolModel& model, int64_t rows, bool host_memory) {
  if (rows == 0) return 0;
  const MolShape& shape = model.shape();
  const size_t bytes =
      Arena::Footprint(DType::kF32, {rows, shape.item_components * shape.component_dim}) +
      Arena::Footprint(DType::kF32, {rows, shape.gate_width()}) +
      ArgumentBytes(host_memory, DType::kF32, {rows, model.config().item_dim}) +
      ArgumentBytes(host_memory, DType::kI32, {rows}) + model.ArenaBytes(rows);
  return static_cast<int64_t>(bytes);
}

int64_t ElementBytes(MolStorage storage) {
  return storage == MolStorage::kF32 ? 4 : storage == MolStorage::kBF16 ? 2 : 1;
}

bool AllFinite(const float* values, int64_t count) {
  // 0 times anything finite is 0.
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] * 0.0f;
  return sum == 0.0f;
}

// A device tensor's floats where the host can read them, once the stream has been waited for.
class HostFloats {
 public:
  HostFloats(Stream& stream, const TensorView& tensor)
      : columns_(tensor.dim(1)), data_(tensor.as<float>()) {
    if (stream.device().spec().host_memory) return;
    copy_.resize(tensor.elements());
    stream.Copy(copy_.data(), tensor.data, tensor.bytes());
    data_ = copy_.data();
  }
  const float* row(int64_t i) const { return data_ + i * columns_; }

 private:
  const int64_t columns_;
  const float* data_;
  std::vector<float> copy_;
};

double MegaBytes(int64_t bytes) { return static_cast<double>(bytes) * 1e-6; }

}  // namespace

struct ItemShard::Projected {
  TensorView components, gates;  // [n, Px * d], [n, G]
  HostFloats component_rows, gate_rows;
};

ItemShardBytes ItemShard::PlanBytes(const MolModel& model, const ItemShardOptions& options,
                                    bool host_memory) {
  const int64_t slots = Slots(options.capacity);
  ItemShardBytes bytes;
  bytes.items = slots * MolSlotBytes(model.shape(), options.storage, options.means);
  // id 8, place 4, index at most 5 / 0.4375, finite 1/8.
  bytes.ids = slots * (8 + 4 + 12);
  bytes.attributes = slots / 8 * (static_cast<int64_t>(options.attributes.size()) + 1);
  bytes.projection = ProjectionBytes(model, ChunkItems(options.capacity), host_memory);
  return bytes;
}

ItemShard::ItemShard(const MolModel& model, ItemShardOptions options, const ItemShardBytes& bytes)
    : model_(model),
      options_(std::move(options)),
      bytes_(bytes),
      slots_(Slots(options_.capacity)),
      index_(0, SlotHash{&ids_}, SlotEqual{&ids_}) {}

absl::StatusOr<std::unique_ptr<ItemShard>> ItemShard::Create(const MolModel& model, Stream& stream,
                                                             ItemShardOptions options) {
  CHECK_GE(options.capacity, 0);
  RETURN_IF_ERROR(RequireMol(stream));
  const ItemShardBytes bytes = PlanBytes(model, options, stream.device().spec().host_memory);
  const int64_t memory = stream.device().spec().memory_bytes / options.sharing;
  const int64_t capacity = options.capacity;
  const auto needs = [&] {
    return absl::StrFormat(
        "%d items need %.1f MB on this rank (items %.1f, ids %.1f, attributes %.1f, projection "
        "%.1f)",
        capacity, MegaBytes(bytes.total()), MegaBytes(bytes.items), MegaBytes(bytes.ids),
        MegaBytes(bytes.attributes), MegaBytes(bytes.projection));
  };
  if (options.capacity > INT32_MAX - kMolBlockRows || (memory > 0 && bytes.total() > memory)) {
    return absl::ResourceExhaustedError(
        options.sharing > 1
            ? absl::StrFormat("retrieval table: %s; the host has %.1f MB for each of its %d ranks: "
                              "use more hosts, bf16 or int8",
                              needs(), MegaBytes(memory), options.sharing)
            : absl::StrFormat(
                  "retrieval table: %s; the device has %.1f MB: use more ranks, bf16 or int8",
                  needs(), MegaBytes(memory)));
  }
  std::unique_ptr<ItemShard> shard(new ItemShard(model, std::move(options), bytes));
  const absl::Status allocated = shard->AllocateMemory(stream.device());
  if (!allocated.ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("retrieval table: ", needs(),
                     ": use more ranks, bf16 or int8: ", std::string(allocated.message())));
  }
  return shard;
}

absl::Status ItemShard::AllocateMemory(Device& device) {
  const MolShape& shape = model_.shape();
  const int64_t element = ElementBytes(options_.storage);
  const bool scaled = options_.storage == MolStorage::kInt8;
  const int64_t vectors = slots_ * shape.item_components;
  ASSIGN_OR_RETURN(components_, device.Allocate(vectors * shape.component_dim * element));
  ASSIGN_OR_RETURN(gates_, device.Allocate(slots_ * shape.gate_width() * element));
  ASSIGN_OR_RETURN(order_memory_, device.Allocate(slots_ * sizeof(uint32_t)));
  if (scaled) {
    ASSIGN_OR_RETURN(scales_, device.Allocate(vectors * sizeof(BF16)));
    ASSIGN_OR_RETURN(gate_scales_, device.Allocate(slots_ * sizeof(BF16)));
  }
  if (options_.means) {
    ASSIGN_OR_RETURN(means_, device.Allocate(slots_ * shape.component_dim * element));
    if (scaled) {
      ASSIGN_OR_RETURN(mean_scales_, device.Allocate(slots_ * sizeof(BF16)));
    }
  }
  ASSIGN_OR_RETURN(projection_, Arena::Create(device, bytes_.projection));
  order_ = static_cast<uint32_t*>(order_memory_.data());
  if (!device.spec().host_memory) {
    host_order_.resize(slots_);
    order_ = host_order_.data();
  }
  ids_.resize(slots_);
  finite_.resize(slots_);
  valid_.resize(mask_words());
  planes_.assign(options_.attributes.size(), std::vector<uint32_t>(mask_words()));
  index_.reserve(options_.capacity);
  zeros_.resize(std::max(shape.item_components * shape.component_dim, shape.gate_width()));
  return absl::OkStatus();
}

MolTableView ItemShard::view() const {
  return {.storage = options_.storage,
          .slots = slots_,
          .components = components_.data(),
          .scales = static_cast<BF16*>(scales_.data()),
          .gates = gates_.data(),
          .gate_scales = static_cast<BF16*>(gate_scales_.data()),
          .means = means_.data(),
          .mean_scales = static_cast<BF16*>(mean_scales_.data()),
          .order = static_cast<uint32_t*>(order_memory_.data())};
}

int64_t ItemShard::size() const {
  const auto lock = ReadLock();
  return static_cast<int64_t>(index_.size());
}
int64_t ItemShard::not_finite() const {
  const auto lock = ReadLock();
  return not_finite_;
}

std::optional<int32_t> ItemShard::Find(int64_t id) const {
  const auto it = index_.find(id);
  return it == index_.end() ? std::nullopt : std::optional<int32_t>(*it);
}

int32_t ItemShard::TakeSlot(int64_t id) {
  int32_t slot = never_used_;
  if (!freed_.empty()) {
    slot = freed_.back();
    freed_.pop_back();
  } else {
    CHECK_LT(slot, options_.capacity) << "no free slot";
    ++never_used_;
  }
  ids_[slot] = id;
  index_.insert(slot);
  return slot;
}

void ItemShard::SetAttributes(int32_t slot, const uint64_t* words) {
  const uint32_t bit = 1u << (slot % 32);
  for (size_t a = 0; a < planes_.size(); ++a) {
    const bool set = words != nullptr && (words[a / 64] >> (a % 64) & 1) != 0;
    uint32_t& word = planes_[a][slot / 32];
    word = set ? word | bit : word & ~bit;
  }
}

absl::StatusOr<int64_t> ItemShard::Put(Stream& stream, const Items& items) {
  const int64_t most = ChunkItems(options_.capacity);
  int64_t bad = 0;
  const std::lock_guard<std::mutex> lock(projection_mutex_);
  for (int64_t first = 0; first < items.count; first += most) {
    Items chunk = items;
    chunk.embeddings += first * model_.config().item_dim;
    chunk.ids += first;
    chunk.order += first;
    if (chunk.attributes != nullptr) chunk.attributes += first * attribute_words();
    chunk.count = std::min(most, items.count - first);
    ASSIGN_OR_RETURN(const int64_t bad_ones, PutChunk(stream, chunk));
    bad += bad_ones;
  }
  return bad;
}

absl::StatusOr<int64_t> ItemShard::PutChunk(Stream& stream, const Items& chunk) {
  const MolShape& shape = model_.shape();
  const int64_t n = chunk.count;
  // Projected outside of the lock: searches go on meanwhile.
  projection_.Reset();
  const TensorView components =
      projection_.Allocate(DType::kF32, {n, shape.item_components * shape.component_dim});
  const TensorView gates = projection_.Allocate(DType::kF32, {n, shape.gate_width()});
  const OpInput<float> embeddings(stream, projection_, chunk.embeddings,
                                  {n, model_.config().item_dim});
  model_.ProjectItems(stream, embeddings.view(), projection_, components, gates);
  const Projected projected{components, gates, {stream, components}, {stream, gates}};
  RETURN_IF_ERROR(stream.Synchronize());
  std::vector<int32_t> slots(n);
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const int64_t bad = EnterChunk(stream, chunk, projected, &slots);
  const OpInput<int32_t> places(stream, projection_, slots.data(), {n});
  MolStore(stream, shape, components, gates, places.view(), view());
  RETURN_IF_ERROR(stream.Synchronize());
  return bad;
}

int64_t ItemShard::EnterChunk(Stream& stream, const Items& chunk, const Projected& projected,
                              std::vector<int32_t>* slots) {
  const int64_t dim = model_.config().item_dim;
  const int64_t width = projected.components.dim(1), gate_width = projected.gates.dim(1);
  int64_t bad = 0, new_begin = slots_, new_end = 0;  // of slots with new places
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t id = chunk.ids[i];
    const std::optional<int32_t> known = Find(id);
    const int32_t slot = known ? *known : TakeSlot(id);
    (*slots)[i] = slot;
    if (!known) {
      order_[slot] = chunk.order[i];
      new_begin = std::min<int64_t>(new_begin, slot);
      new_end = std::max<int64_t>(new_end, slot + 1);
    }
    if (known && !finite_[slot]) --not_finite_;
    const bool finite = AllFinite(chunk.embeddings + i * dim, dim) &&
                        AllFinite(projected.component_rows.row(i), width) &&
                        AllFinite(projected.gate_rows.row(i), gate_width);
    finite_[slot] = finite;
    const uint32_t bit = 1u << (slot % 32);
    valid_[slot / 32] = finite ? valid_[slot / 32] | bit : valid_[slot / 32] & ~bit;
    if (!finite) {
      ++bad, ++not_finite_;
      stream.Copy(projected.components.row<float>(i), zeros_.data(), width * sizeof(float));
      stream.Copy(projected.gates.row<float>(i), zeros_.data(), gate_width * sizeof(float));
    }
    SetAttributes(slot,
                  chunk.attributes == nullptr ? nullptr : chunk.attributes + i * attribute_words());
  }
  CopyOrder(stream, new_begin, new_end);
  return bad;
}

void ItemShard::CopyOrder(Stream& stream, int64_t begin, int64_t end) const {
  if (host_order_.empty() || begin >= end) return;
  stream.Copy(static_cast<uint32_t*>(order_memory_.data()) + begin, order_ + begin,
              (end - begin) * sizeof(uint32_t));
}

bool ItemShard::Erase(int64_t id) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const std::optional<int32_t> slot = Find(id);
  if (!slot) return false;
  index_.erase(*slot);
  if (!finite_[*slot]) --not_finite_;
  valid_[*slot / 32] &= ~(1u << (*slot % 32));
  freed_.push_back(*slot);
  return true;
}

void ItemShard::FillMask(const Filter& filter, const std::vector<uint32_t>* rows,
                         int32_t* words) const {
  for (int64_t w = 0; w < mask_words(); ++w) {
    uint32_t mask = valid_[w];
    for (const std::vector<Filter::Literal>& clause : filter.clauses) {
      uint32_t any = 0;
      for (const Filter::Literal& literal : clause) {
        const uint32_t plane = planes_[literal.attribute][w];
        any |= literal.negated ? ~plane : plane;
      }
      mask &= any;
    }
    if (rows != nullptr) {
      for (uint32_t left = mask; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const uint32_t row = order_[w * 32 + lane];
        const bool set = row / 32 < rows->size() && ((*rows)[row / 32] >> (row % 32) & 1) != 0;
        if (!set) mask &= ~(1u << lane);
      }
    }
    words[w] = static_cast<int32_t>(mask);
  }
}

ItemShard::BlockWindow::BlockWindow(const ItemShard& shard, Stream& stream)
    : shard_(shard), stream_(stream) {
  const MolShape& shape = shard.model_.shape();
  const int64_t element = ElementBytes(shard.options_.storage);
  const auto add = [&](const Buffer& buffer, int64_t vectors, int64_t values, int64_t bytes) {
    if (buffer.data() == nullptr) return;
    const int64_t piece = MolPiece(stream, shard.options_.storage, values);
    parts_.push_back({static_cast<char*>(buffer.data()), vectors, values, piece, bytes, nullptr});
  };
  add(shard.components_, shape.item_components, shape.component_dim, element);
  add(shard.scales_, shape.item_components, 1, 2);
  add(shard.gates_, 1, shape.gate_width(), element);
  add(shard.gate_scales_, 1, 1, 2);
  add(shard.means_, 1, shape.component_dim, element);
  add(shard.mean_scales_, 1, 1, 2);
  if (stream.device().spec().host_memory) return;
  int64_t bytes = 0;
  for (const Part& part : parts_) bytes += part.block_bytes();
  copy_.resize(bytes);
}

absl::Status ItemShard::BlockWindow::MoveTo(int64_t block) {
  if (block == block_) return absl::OkStatus();
  RETURN_IF_ERROR(Flush());
  block_ = block;
  char* host = copy_.data();
  for (Part& part : parts_) {
    char* there = part.base + block * part.block_bytes();
    part.host = copy_.empty() ? there : host;
    host += part.block_bytes();
    if (!copy_.empty()) stream_.Copy(part.host, there, part.block_bytes());
  }
  return stream_.Synchronize();
}

absl::Status ItemShard::BlockWindow::Flush() {
  if (!written_ || copy_.empty()) return absl::OkStatus();
  written_ = false;
  for (const Part& part : parts_) {
    stream_.Copy(part.base + block_ * part.block_bytes(), part.host, part.block_bytes());
  }
  shard_.CopyOrder(stream_, block_ * kMolBlockRows, (block_ + 1) * kMolBlockRows);
  return stream_.Synchronize();
}

template <typename Visit>
absl::Status ItemShard::ForEachElement(BlockWindow& window, int32_t slot, Visit&& visit) {
  RETURN_IF_ERROR(window.MoveTo(slot / kMolBlockRows));
  for (const BlockWindow::Part& part : window.parts_) {
    for (int64_t v = 0; v < part.vectors; ++v) {
      char* vector = part.host + v * part.values * kMolBlockRows * part.element;
      for (int64_t k = 0; k < part.values; ++k) {
        visit(vector + MolPlace(k, slot % kMolBlockRows, part.piece) * part.element, part.element);
      }
    }
  }
  return absl::OkStatus();
}

int64_t ItemShard::row_bytes() const {
  return 8 + 4 + 4 + attribute_words() * 8 +
         MolSlotBytes(model_.shape(), options_.storage, options_.means);
}

std::vector<int32_t> ItemShard::OccupiedSlots() const {
  std::vector<int32_t> slots(index_.begin(), index_.end());
  std::sort(slots.begin(), slots.end());
  return slots;
}

absl::Status ItemShard::ExportRow(BlockWindow& window, int32_t slot, char* out) const {
  const auto put = [&out](const void* from, int64_t bytes) {
    if (bytes == 0) return;
    std::memcpy(out, from, bytes);
    out += bytes;
  };
  const uint32_t finite = finite_[slot] ? 1 : 0;
  put(&ids_[slot], 8);
  put(&order_[slot], 4);
  put(&finite, 4);
  for (int64_t w = 0; w < attribute_words(); ++w) {
    uint64_t word = 0;
    for (size_t a = w * 64; a < std::min<size_t>(planes_.size(), (w + 1) * 64); ++a) {
      word |= uint64_t{planes_[a][slot / 32] >> (slot % 32) & 1} << (a % 64);
    }
    put(&word, 8);
  }
  return ForEachElement(window, slot, [&](const char* at, int64_t bytes) { put(at, bytes); });
}

absl::StatusOr<bool> ItemShard::ImportRow(BlockWindow& window, const char* row) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const auto get = [&row](void* to, int64_t bytes) {
    if (bytes == 0) return;  // `to` may be null
    std::memcpy(to, row, bytes);
    row += bytes;
  };
  int64_t id = 0;
  uint32_t order = 0, finite = 0;
  get(&id, 8);
  get(&order, 4);
  get(&finite, 4);
  if (Find(id)) return false;
  const int32_t slot = TakeSlot(id);
  order_[slot] = order;
  finite_[slot] = finite != 0;
  if (finite != 0) {
    valid_[slot / 32] |= 1u << (slot % 32);
  } else {
    ++not_finite_;
  }
  std::vector<uint64_t> words(attribute_words());
  get(words.data(), attribute_words() * 8);
  SetAttributes(slot, words.data());
  RETURN_IF_ERROR(ForEachElement(window, slot, [&](char* at, int64_t bytes) { get(at, bytes); }));
  window.written_ = true;
  return true;
}

}  // namespace trireme
