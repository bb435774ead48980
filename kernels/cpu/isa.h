// The hot loops of the CPU backend, compiled once per instruction set (isa_*.cc), and the choice
// between them. Each function does a range of rows, panels or heads on the calling thread; sharing
// out between threads is its caller's.
//
// The isa_*.cc see this header and those below it only: headers with objects to construct or
// templates to share would put code for one instruction set where every processor runs it.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/cpu/mol_block.h"
#include "kernels/norm.h"
#include "kernels/tensor.h"

namespace trireme::cpu {

// Columns of y = x W^T that lie together in a packed weight: 4 vectors of 16 floats, so that one
// row alone has four independent sums to hide the latency of multiply-add, and six rows fill 24 of
// 32 vector registers.
inline constexpr int64_t kPanelColumns = 64;
// Rows whose sums one call of matmul_panel may hold: 192 * 64 floats are 48 KiB of scratch.
inline constexpr int64_t kMatMulRows = 192;
// Bytes of a panel that stay in the second-level cache while all row blocks pass over them: a
// quarter of 1 MiB. Sums are kept in float between such stretches of k, which changes no bit.
inline constexpr int64_t kStretchBytes = 256 * 1024;

// One panel of a packed weight against some rows. Weight layout: panels of kPanelColumns columns
// (the last one filled up with zeros); in a panel f32 and f16 lie as [K][column], bf16 as [K /
// 2][column][2] (K filled up to even), which is what the bf16 dot-product instructions of x86 and
// Arm read, and e4m3 as bf16.
struct MatMulPanel {
  const void* x =
      nullptr;  // [rows, K]: bf16 where that is native and the activations are bf16, else float
  DType x_type = DType::kF32;
  int64_t x_stride = 0;
  int64_t rows = 0;  // <= kMatMulRows
  const void* weights = nullptr;
  DType weight_type = DType::kF32;
  const float* scales = nullptr;  // [kPanelColumns], of e4m3: what sums of x q / 256 are times
  int64_t k = 0;
  int64_t columns = 0;     // valid ones, <= kPanelColumns
  ConstTensorView bias{};  // [columns] or empty
  TensorView y{};          // [rows, columns]
};

// One query block of one sequence and kv head.
struct AttentionBlock {
  ConstTensorView q;            // [T, Hq * D]
  ConstTensorView k, v;         // [pages, page_size, Hkv, D]
  ConstTensorView page_tables;  // [S, max_pages]
  TensorView out;               // [T, Hq * D]
  float scale = 1.0f;
  int64_t sliding_window = 0;
  int64_t sequence = 0;
  int64_t kv_head = 0;
  int64_t group = 1;           // query heads per kv head
  int64_t row_begin = 0;       // of q and out
  int64_t row_end = 0;         // (row_end - row_begin) * group <= kAttentionRows, or one row
  int64_t first_position = 0;  // of row_begin
};
inline constexpr int64_t kAttentionRows = 32;

// Arguments of RopeAndStoreKv (ops.h).
struct RopeRows {
  TensorView qkv;
  ConstTensorView positions, slot_mapping;
  ConstTensorView cos_sin, q_norm, k_norm;
  float norm_eps = 0.0f;
  int64_t q_heads = 0;
  TensorView k, v;
};

struct IsaKernels {
  const char* name;
  bool native_bf16;  // matmul_panel wants bf16 activations with bf16 weights
  void (*norm)(ConstTensorView x, const NormParams& norm, TensorView out, int64_t begin,
               int64_t end);
  void (*add_norm)(TensorView residual, ConstTensorView delta, const NormParams& norm,
                   TensorView out, int64_t begin, int64_t end);
  void (*add)(TensorView x, ConstTensorView delta, int64_t begin, int64_t end);
  void (*gelu)(TensorView x, int64_t begin, int64_t end);
  void (*silu_and_mul)(ConstTensorView gate_up, TensorView out, int64_t begin, int64_t end);
  void (*rope_and_store_kv)(const RopeRows& rope, int64_t begin, int64_t end);
  void (*to_float)(ConstTensorView x, float* out, int64_t begin,
                   int64_t end);  // out [rows, columns], contiguous
  void (*matmul_panel)(const MatMulPanel& panel,
                       float* scratch);  // MatMulScratchFloats(rows, weight type)
  void (*attention)(const AttentionBlock& block,
                    float* scratch);  // AttentionScratchFloats(D, rows)
  // Mixture-of-Logits (mol_block.h says what each is given).
  uint32_t (*mol_logits)(const MolLogitsArgs& args);
  void (*mol_above)(const float* logits, const float* floors, int64_t count, uint32_t* masks);
  void (*mol_gate)(const MolGateArgs& args);
  void (*mol_dot)(const MolDotArgs& args);
  void (*silu)(float* x, int64_t n);
  void (*l2_normalize)(float* x, int64_t n, float eps);
  // For ceilings: multiply-adds on registers only, and a sum over memory.
  double (*peak_flops)(DType dtype, int64_t rounds);  // gives the FLOPs done
  float (*read)(const void* data, int64_t bytes);     // bytes a multiple of 256
};

// Floats that `matmul_panel` needs: sums, and room for a stretch of e4m3 weights as bf16.
int64_t MatMulScratchFloats(int64_t rows, DType weight_type);
// Floats that `attention` needs for `rows` (queries times group) of head_dim.
int64_t AttentionScratchFloats(int64_t head_dim, int64_t rows);

// The one in use: the best this processor can run, unless a test chose another.
const IsaKernels& BestIsa();
// All this processor can run, best first. UseIsa is for tests, and for times when no op runs:
// packed weights stay valid.
int IsaCount();
const IsaKernels& IsaAt(int i);
void UseIsa(int i);

}  // namespace trireme::cpu
