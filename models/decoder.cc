#include "models/decoder.h"

namespace trireme {

void Decoder::Embed(Stream& stream, const Batch& batch, TensorView hidden) {
  Embedding(stream, batch.token_ids, *embedding_, embedding_begin_, hidden);
  groups_->tp->AllReduceSum(stream, hidden);
}

NormParams Decoder::ParamsOf(const NormWeights& norm) const {
  return {.kind = config_.norm,
          .weight = norm.weight.view(),
          .bias = norm.bias.view(),
          .eps = static_cast<float>(config_.norm_eps)};
}

void Decoder::Forward(Stream& stream, const Batch& batch, const KvCache& kv, TensorView hidden) {
  Communicator& tp = *groups_->tp;
  arena_.Reset();
  const TensorView normed = arena_.Allocate(dtype_, hidden.shape);
  const TensorView delta = arena_.Allocate(dtype_, hidden.shape);
  Norm(stream, hidden, ParamsOf(layers_[0].input_norm), normed);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    Attention(stream, batch, layer, kv.Layer(static_cast<int64_t>(i), batch.page_tables), normed,
              delta);
    tp.AllReduceAddNorm(stream, delta, hidden, ParamsOf(layer.post_norm), normed);
    Mlp(stream, layer, normed, delta);
    if (i + 1 < layers_.size()) {
      tp.AllReduceAddNorm(stream, delta, hidden, ParamsOf(layers_[i + 1].input_norm), normed);
    } else {
      tp.AllReduceSum(stream, delta);
      Add(stream, hidden, delta);
    }
  }
}

void Decoder::Attention(Stream& stream, const Batch& batch, const Layer& layer, const PagedKv& kv,
                        ConstTensorView normed, TensorView delta) {
  const int64_t tokens = normed.dim(0), head_dim = config_.head_dim;
  const RopeParams rope{.cos_sin = cos_sin_.view(),
                        .q_norm = layer.q_norm.view(),
                        .k_norm = layer.k_norm.view(),
                        .norm_eps = static_cast<float>(config_.norm_eps)};
  const size_t mark = arena_.used();
  const TensorView qkv = arena_.Allocate(dtype_, {tokens, (q_heads_ + 2 * kv_heads_) * head_dim});
  const TensorView attended = arena_.Allocate(dtype_, {tokens, q_heads_ * head_dim});
  MatMul(stream, normed, *layer.qkv, layer.qkv_bias.view(), qkv);
  RopeAndStoreKv(stream, qkv, batch.positions, batch.slot_mapping, rope, q_heads_, kv);
  AttentionShape shape = layer.attention;
  shape.min_q_len = batch.min_q_len;
  shape.max_q_len = batch.max_q_len;
  shape.workspace = attention_workspace_.view();
  PagedAttention(stream, qkv.Columns(0, q_heads_ * head_dim), kv, batch.cu_q_lens, batch.kv_lens,
                 shape, attended);
  MatMul(stream, attended, *layer.o, layer.o_bias.view(), delta);
  arena_.Rewind(mark);
}

void Decoder::Mlp(Stream& stream, const Layer& layer, ConstTensorView normed, TensorView delta) {
  const int64_t tokens = normed.dim(0);
  const size_t mark = arena_.used();
  const TensorView activated = arena_.Allocate(dtype_, {tokens, intermediate_});
  const auto up = config_.mlp == MlpKind::kSwiGlu ? MatMulSwiGlu : MatMulGelu;
  up(stream, normed, *layer.gate_up, layer.gate_up_bias.view(), activated);
  MatMul(stream, activated, *layer.down, layer.down_bias.view(), delta);
  arena_.Rewind(mark);
}

ConstTensorView Decoder::NormedRows(Stream& stream, const Batch& batch, ConstTensorView hidden) {
  arena_.Reset();
  const TensorView rows = arena_.Allocate(dtype_, {batch.logit_count(), config_.hidden_size});
  GatherRows(stream, hidden, batch.logit_rows, rows);
  Norm(stream, rows, ParamsOf(final_norm_), rows);
  return rows;
}

void Decoder::Logits(Stream& stream, const Batch& batch, ConstTensorView hidden,
                     TensorView logits) {
  MatMul(stream, NormedRows(stream, batch, hidden), *head_, ConstTensorView(), logits);
}

}  // namespace trireme
