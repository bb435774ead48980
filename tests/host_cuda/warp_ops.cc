// What kernels reach through the CUDA names: barriers, shuffles, votes, tensor cores, asynchronous
// copies, shared memory.
#include <bit>
#include <cstring>

#include "kernels/dtype.h"
#include "tests/host_cuda/block_engine.h"

namespace host_cuda {
namespace {

struct ShuffleSlot {
  void* value;
  uint32_t bytes;
  int src;
  bool bad;
  alignas(16) unsigned char out[16];
};
template <size_t kBytes>
void Move(void* dst, const void* src) {
  __builtin_memcpy(dst, src, kBytes);
}  // inlined: TSan does not see it
void MoveBytes(void* dst, const void* src, size_t bytes) {
  switch (bytes) {
    case 1:
      return Move<1>(dst, src);
    case 2:
      return Move<2>(dst, src);
    case 4:
      return Move<4>(dst, src);
    case 8:
      return Move<8>(dst, src);
    case 12:
      return Move<12>(dst, src);
    default:
      return Move<16>(dst, src);
  }
}

// Element i of those that lie in a register, the first in its low bits.
float ElementOf(uint32_t bits, int i, Element element) {
  if (element == Element::kE4M3) {
    return trireme::ToFloat(trireme::E4M3{static_cast<uint8_t>(bits >> 8 * i)});
  }
  bits = bits >> 16 * i & 0xffff;
  if (element == Element::kBF16) return std::bit_cast<float>(bits << 16);
  __half_raw raw;
  raw.x = static_cast<uint16_t>(bits);
  return __half2float(__half(raw));
}

}  // namespace

void Fail(const char* what, Loc loc) { BlockEngine::Get().FailHere(what, loc); }
int LaneId() { return BlockEngine::Get().current().lane; }
void SpinPause() { BlockEngine::Get().Spin(); }
void WaitForPrevious() { BlockEngine::Get().current().waited = true; }
void BlockBarrier(int id, int count, Loc loc) { BlockEngine::Get().Barrier(id, count, loc); }

void WarpBarrier(uint32_t mask, Loc loc) { BlockEngine::Get().WarpSync(mask, loc); }

void Shuffle(uint32_t mask, void* inout, size_t bytes, int src_lane, Loc loc) {
  ShuffleSlot slot{inout, static_cast<uint32_t>(bytes), src_lane & 31, false, {}};
  BlockEngine& e = BlockEngine::Get();
  e.Collective(
      [](void** slots, uint32_t lanes) {
        for (int pass = 0; pass < 2; ++pass)
          for (uint32_t m = lanes; m; m &= m - 1) {
            auto& me = *static_cast<ShuffleSlot*>(slots[std::countr_zero(m)]);
            if (pass == 1) {
              MoveBytes(me.value, me.out, me.bytes);
              continue;
            }
            auto* from = static_cast<ShuffleSlot*>(slots[me.src]);
            me.bad = !from;  // the source lane has exited or is not in the mask
            if (from) MoveBytes(me.out, from->value, me.bytes);
          }
      },
      mask, &slot, loc);
  if (slot.bad) e.FailHere("shuffle reads a lane that does not take part", loc);
}

uint32_t Ballot(uint32_t mask, bool predicate, Loc loc) {
  struct Slot {
    bool predicate;
    uint32_t result;
  } slot{predicate, 0};
  BlockEngine::Get().Collective(
      [](void** slots, uint32_t lanes) {
        uint32_t bits = 0;
        for (uint32_t m = lanes; m; m &= m - 1)
          if (static_cast<Slot*>(slots[std::countr_zero(m)])->predicate) bits |= m & -m;
        for (uint32_t m = lanes; m; m &= m - 1)
          static_cast<Slot*>(slots[std::countr_zero(m)])->result = bits;
      },
      mask, &slot, loc);
  return slot.result;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k32": lane / 4 is a row of A and a
// column of B, lane % 4 which of the four registers that share 8 or 16 k's.
void Mma(float d[4], const uint32_t a[4], const uint32_t b[2], Element element, Loc loc) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
    Element element;
    bool done;
  } slot{d, a, b, element, false};
  BlockEngine::Get().Collective(
      [](void** slots, uint32_t lanes) {
        if (lanes != 0xffffffffu) return;
        const Element element = static_cast<Slot*>(slots[0])->element;
        const int each = element == Element::kE4M3 ? 4 : 2, depth = 8 * each;
        alignas(32) float A[16][32], B[32][8], D[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Slot& s = *static_cast<Slot*>(slots[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, k = (t + i / 2 * 4) * each;
            for (int e = 0; e < each; ++e) A[row][k + e] = ElementOf(s.a[i], e, element);
            D[row][t * 2] = s.d[i % 2 * 2], D[row][t * 2 + 1] = s.d[i % 2 * 2 + 1];
          }
          for (int i = 0; i < 2; ++i)
            for (int e = 0; e < each; ++e)
              B[(t + i * 4) * each + e][g] = ElementOf(s.b[i], e, element);
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < depth; ++k)
            for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
        for (int lane = 0; lane < 32; ++lane) {
          const Slot& s = *static_cast<Slot*>(slots[lane]);
          for (int i = 0; i < 4; ++i) s.d[i] = D[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
          static_cast<Slot*>(slots[lane])->done = true;
        }
      },
      0xffffffffu, &slot, loc);
  if (!slot.done) Fail("mma by an incomplete warp", loc);
}

void CheckRow(const void* row, Loc loc) {
  BlockEngine& e = BlockEngine::Get();
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) e.FailHere("ldmatrix row not aligned", loc);
  if (!e.InShared(row, 16)) e.FailHere("ldmatrix row not in shared memory", loc);
}

void LdMatrix(uint32_t* r, uint4 row, int count, bool transpose, Loc loc) {
  struct Slot {
    uint32_t* r;
    uint16_t row[8];
    int count;
    bool transpose, done;
  } slot{r, {}, count, transpose, false};
  Move<16>(slot.row, &row);
  BlockEngine::Get().Collective(
      [](void** slots, uint32_t lanes) {
        if (lanes != 0xffffffffu) return;
        for (int lane = 0; lane < 32; ++lane) {
          Slot& me = *static_cast<Slot*>(slots[lane]);
          me.done = true;
          for (int m = 0; m < me.count; ++m) {
            auto at = [&](int i, int j) -> uint32_t {
              return static_cast<Slot*>(slots[m * 8 + i])->row[j];
            };
            const int g = lane / 4, t = lane % 4 * 2;
            me.r[m] = me.transpose ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
          }
        }
      },
      0xffffffffu, &slot, loc);
  if (!slot.done) Fail("ldmatrix by an incomplete warp", loc);
}

void AsyncCopy(void* dst, const void* src, size_t bytes, size_t valid) {
  BlockEngine& e = BlockEngine::Get();
  if (reinterpret_cast<uintptr_t>(dst) % bytes || reinterpret_cast<uintptr_t>(src) % bytes)
    e.FailHere("cp.async address not aligned", Loc::current());
  if (!e.InShared(dst, bytes)) e.FailHere("cp.async to no shared memory", Loc::current());
  if (valid > bytes) e.FailHere("cp.async of more than it copies", Loc::current());
  std::memset(dst, 0xff, bytes);  // until it is waited for
  e.current().copies.push_back({dst, src, bytes, valid});
}
void AsyncCommit() {
  CudaThread& t = BlockEngine::Get().current();
  t.groups.push_back(t.copies.size());
}
void AsyncWait(int newest_left) {
  CudaThread& t = BlockEngine::Get().current();
  const int done = static_cast<int>(t.groups.size()) - newest_left;
  if (done <= 0) return;
  const size_t end = t.groups[done - 1];
  for (size_t i = 0; i < end; ++i) {
    const PendingCopy& c = t.copies[i];
    std::memcpy(c.dst, c.src, c.valid);
    std::memset(static_cast<char*>(c.dst) + c.valid, 0, c.bytes - c.valid);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + end);
  t.groups.erase(t.groups.begin(), t.groups.begin() + done);
  for (size_t& g : t.groups) g -= end;
}

void* DynamicShared() { return BlockEngine::Get().DynamicShared(); }
void* StaticShared(const void* tag, size_t bytes) {
  return BlockEngine::Get().StaticShared(tag, bytes);
}

}  // namespace host_cuda
