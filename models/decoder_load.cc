// Loading of a decoder stage: reads this rank's pieces, fuses q/k/v and gate/up into one matrix
// each, packs them.

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/status.h"
#include "models/decoder.h"
#include "models/memory_plan.h"

namespace trireme {

class Decoder::Builder {
 public:
  Builder(Decoder& decoder, WeightLoader& loader, Stream& stream, const DecoderOptions& options)
      : decoder_(decoder),
        loader_(loader),
        stream_(stream),
        options_(options),
        tp_(decoder.groups_->tp_index()),
        tp_size_(decoder.groups_->topology.tp_size),
        total_bytes_(loader.bytes_read()) {}

  // Vectors one after the other. An empty name means that the model has none; this rank may not
  // have any of them.
  absl::Status Vector(const std::vector<const WeightSpec*>& specs, Tensor& out) {
    if (specs[0]->name.empty()) return absl::OkStatus();
    const int64_t length = RowsOf(specs);
    if (length == 0) return absl::OkStatus();
    std::vector<char> host(static_cast<size_t>(length) * SizeOf(decoder_.dtype_));
    const TensorView all(host.data(), decoder_.dtype_, Shape{length});
    RETURN_IF_ERROR(Read(specs, 0, all, /*finite=*/false));
    ASSIGN_OR_RETURN(out, Tensor::Create(stream_.device(), all.dtype, all.shape));
    stream_.Copy(out.view().data, all.data, static_cast<size_t>(all.bytes()));
    RETURN_IF_ERROR(stream_.Synchronize());
    decoder_.weight_bytes_ += out.bytes();
    return absl::OkStatus();
  }

  absl::Status Norm(const WeightSpec& weight, const WeightSpec& bias, NormWeights& out) {
    RETURN_IF_ERROR(Vector({&weight}, out.weight));
    return Vector({&bias}, out.bias);
  }

  // Matrices stacked by rows. Pointer is a unique_ptr or a shared_ptr.
  template <typename Pointer>
  absl::Status Linear(const std::vector<const WeightSpec*>& specs, Pointer& out) {
    return Linear(specs, out, decoder_.dtype_, LinearUse::kMatMul, nullptr);
  }
  template <typename Pointer>
  absl::Status Linear(const std::vector<const WeightSpec*>& specs, Pointer& out, DType dtype,
                      LinearUse use, const float* row_maxima) {
    const WeightSpec& first = *specs[0];
    const int64_t columns =
        first.split == Split::kCols ? PieceOfSpec(first, tp_, tp_size_).size() : first.shape[1];
    const bool finite = dtype == DType::kE4M3;
    const auto source = [&](int64_t row, TensorView rows) {
      return Read(specs, row, rows, finite);
    };
    ASSIGN_OR_RETURN(
        std::unique_ptr<LinearWeight> packed,
        PackLinearFrom(stream_, RowsOf(specs), columns, dtype, source, use, row_maxima));
    packed->quantizes_activations =
        dtype == DType::kE4M3 && options_.quantization == Quantization::kFp8Dynamic;
    out = std::move(packed);
    RETURN_IF_ERROR(stream_.Synchronize());
    decoder_.weight_bytes_ += out->bytes;
    return absl::OkStatus();
  }

  // Adds to what the progress is measured against. All specs come before the first Read.
  void Expect(const WeightSpec& spec) {
    if (!spec.name.empty()) total_bytes_ += loader_.PieceBytes(spec, tp_, tp_size_);
  }

  absl::Status LoadLayer(int64_t index, const LayerWeightSpecs& specs, Layer& layer) {
    RETURN_IF_ERROR(Norm(specs.input_norm, specs.input_norm_bias, layer.input_norm));
    const DType type =
        options_.quantization != Quantization::kNone ? DType::kE4M3 : decoder_.dtype_;
    // Of the whole rows of o and down, where they are cut.
    const int64_t at = 2 * (index - decoder_.layer_range_.begin) * decoder_.config_.hidden_size;
    const bool cut = !options_.row_maxima.empty();
    const float* o_maxima = cut ? options_.row_maxima.data() + at : nullptr;
    const float* down_maxima = cut ? o_maxima + decoder_.config_.hidden_size : nullptr;
    constexpr LinearUse kPlain = LinearUse::kMatMul, kGated = LinearUse::kMatMulSwiGlu;
    const bool gated = decoder_.config_.mlp == MlpKind::kSwiGlu;
    std::vector<const WeightSpec*> up = {&specs.up}, up_bias = {&specs.up_bias};
    if (gated)
      up.insert(up.begin(), &specs.gate), up_bias.insert(up_bias.begin(), &specs.gate_bias);
    RETURN_IF_ERROR(Linear({&specs.q, &specs.k, &specs.v}, layer.qkv, type, kPlain, nullptr));
    RETURN_IF_ERROR(Vector({&specs.q_bias, &specs.k_bias, &specs.v_bias}, layer.qkv_bias));
    RETURN_IF_ERROR(Vector({&specs.q_norm}, layer.q_norm));
    RETURN_IF_ERROR(Vector({&specs.k_norm}, layer.k_norm));
    RETURN_IF_ERROR(Linear({&specs.o}, layer.o, type, kPlain, o_maxima));
    RETURN_IF_ERROR(Vector({&specs.o_bias}, layer.o_bias));
    RETURN_IF_ERROR(Norm(specs.post_norm, specs.post_norm_bias, layer.post_norm));
    RETURN_IF_ERROR(Linear(up, layer.gate_up, type, gated ? kGated : kPlain, nullptr));
    RETURN_IF_ERROR(Vector(up_bias, layer.gate_up_bias));
    RETURN_IF_ERROR(Linear({&specs.down}, layer.down, type, kPlain, down_maxima));
    RETURN_IF_ERROR(Vector({&specs.down_bias}, layer.down_bias));
    layer.attention.scale = 1.0f / std::sqrt(static_cast<float>(decoder_.config_.head_dim));
    layer.attention.sliding_window = decoder_.config_.SlidingWindow(index);
    return absl::OkStatus();
  }

  absl::Status RotationTable() {
    const std::vector<double> frequencies = RopeFrequencies(decoder_.config_);
    const int64_t half = static_cast<int64_t>(frequencies.size());
    ASSIGN_OR_RETURN(decoder_.cos_sin_, Tensor::Create(stream_.device(), DType::kF32,
                                                       {options_.max_positions, 2 * half}));
    constexpr int64_t kPiece = 4096;  // positions at a time
    std::vector<float> piece(
        static_cast<size_t>(std::min(kPiece, options_.max_positions) * 2 * half));
    for (int64_t begin = 0; begin < options_.max_positions; begin += kPiece) {
      const int64_t count = std::min(kPiece, options_.max_positions - begin);
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t i = 0; i < half; ++i) {
          const double angle = static_cast<double>(begin + p) * frequencies[i];
          piece[p * 2 * half + i] = static_cast<float>(std::cos(angle));
          piece[p * 2 * half + half + i] = static_cast<float>(std::sin(angle));
        }
      }
      const TensorView rows = decoder_.cos_sin_.view().Rows(begin, count);
      stream_.Copy(rows.data, piece.data(), static_cast<size_t>(rows.bytes()));
      RETURN_IF_ERROR(stream_.Synchronize());
    }
    return absl::OkStatus();
  }

  absl::Status Activations() {
    const int64_t bytes = ArenaBytes(decoder_.config_, tp_, tp_size_, decoder_.dtype_,
                                     options_.max_batch_tokens, options_.max_logit_rows);
    ASSIGN_OR_RETURN(decoder_.arena_, Arena::Create(stream_.device(), static_cast<size_t>(bytes)));
    const Decoder& d = decoder_;
    const int64_t workspace = AttentionWorkspaceBytes(
        stream_,
        {.dtype = d.dtype_,
         .sequences = options_.max_sequences,
         .q_heads = d.q_heads_,
         .kv_heads = d.kv_heads_,
         .head_dim = d.config_.head_dim,
         .max_kv_len = options_.max_kv_len > 0 ? options_.max_kv_len : options_.max_positions});
    if (workspace > 0) {
      ASSIGN_OR_RETURN(decoder_.attention_workspace_,
                       Tensor::Create(stream_.device(), DType::kU8, {workspace}));
    }
    return absl::OkStatus();
  }

  // After all weights.
  absl::Status MatMulRoom() {
    std::vector<const LinearWeight*> weights;
    for (const Layer& layer : decoder_.layers_) {
      for (const auto* weight : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
        weights.push_back(weight->get());
    }
    if (decoder_.head_ != nullptr) weights.push_back(decoder_.head_.get());
    const int64_t rows = std::max(options_.max_batch_tokens, options_.max_logit_rows);
    ASSIGN_OR_RETURN(decoder_.matmul_workspace_bytes_, ReserveMatMul(stream_, rows, weights));
    return absl::OkStatus();
  }

 private:
  int64_t RowsOf(const WeightSpec& spec) const {
    return spec.split == Split::kCols ? spec.shape[0] : PieceOfSpec(spec, tp_, tp_size_).size();
  }
  int64_t RowsOf(const std::vector<const WeightSpec*>& specs) const {
    int64_t rows = 0;
    for (const WeightSpec* spec : specs) rows += RowsOf(*spec);
    return rows;
  }

  // Rows [row, row + out.dim(0)) of this rank's pieces of `specs`, stacked; `finite`: others are an
  // error. Called from several threads.
  absl::Status Read(const std::vector<const WeightSpec*>& specs, int64_t row, TensorView out,
                    bool finite) {
    int64_t begin = 0, done = 0;
    for (const WeightSpec* spec : specs) {
      const int64_t rows = RowsOf(*spec), first = row + done - begin;
      if (done < out.dim(0) && first < rows) {
        const int64_t count = std::min(rows - first, out.dim(0) - done);
        const TensorView part = out.Rows(done, count);
        RETURN_IF_ERROR(loader_.LoadRows(*spec, tp_, tp_size_, first, part));
        if (finite) RETURN_IF_ERROR(loader_.CheckFinite(*spec, first, part));
        done += count;
      }
      begin += rows;
    }
    if (options_.progress) {
      const std::lock_guard<std::mutex> lock(progress_);
      options_.progress(loader_.bytes_read(), total_bytes_);
    }
    return absl::OkStatus();
  }

  Decoder& decoder_;
  WeightLoader& loader_;
  Stream& stream_;
  const DecoderOptions& options_;
  const int tp_, tp_size_;
  std::mutex progress_;
  int64_t total_bytes_;  // read before, and to be read
};

absl::StatusOr<std::vector<float>> Decoder::RowMaxima(const ModelConfig& config,
                                                      const ProcessGroups& groups,
                                                      WeightLoader& loader,
                                                      const std::vector<int64_t>& pp_split) {
  const DecoderWeightSpecs specs = WeightSpecsOf(config);
  RETURN_IF_ERROR(loader.Check(AllWeightSpecs(config)));
  const Range layers = StageLayers(config, groups.topology.pp_size, pp_split)[groups.pp_index()];
  std::vector<float> maxima(2 * layers.size() * config.hidden_size);
  float* out = maxima.data();
  for (int64_t i = layers.begin; i < layers.end; ++i) {
    for (const WeightSpec* spec : {&specs.layers[i].o, &specs.layers[i].down}) {
      RETURN_IF_ERROR(loader.RowMaxima(*spec, groups.tp_index(), groups.topology.tp_size, out));
      out += config.hidden_size;
    }
  }
  return maxima;
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Load(const ModelConfig& config,
                                                       const ProcessGroups& groups,
                                                       WeightLoader& loader, Stream& stream,
                                                       const DecoderOptions& options) {
  const DecoderWeightSpecs specs = WeightSpecsOf(config);
  RETURN_IF_ERROR(loader.Check(AllWeightSpecs(config)));
  std::unique_ptr<Decoder> decoder(new Decoder);
  decoder->config_ = config;
  decoder->groups_ = &groups;
  decoder->dtype_ = options.dtype;
  const int tp = groups.tp_index(), tp_size = groups.topology.tp_size;
  CHECK(options.quantization == Quantization::kNone || options.row_maxima.empty() == (tp_size == 1))
      << "the rows' maxima are for quantised layers that are cut";
  decoder->layer_range_ =
      StageLayers(config, groups.topology.pp_size, options.pp_split)[groups.pp_index()];
  decoder->vocabulary_ = PieceOfSpec(specs.head, tp, tp_size);
  decoder->q_heads_ = PieceOfSpec(specs.layers[0].q, tp, tp_size).size() / config.head_dim;
  decoder->kv_heads_ = PieceOfSpec(specs.layers[0].k, tp, tp_size).size() / config.head_dim;
  decoder->intermediate_ = PieceOfSpec(specs.layers[0].up, tp, tp_size).size();
  Builder builder(*decoder, loader, stream, options);
  const bool head_is_embedding = config.tied_head && groups.first_stage();
  if (groups.first_stage()) builder.Expect(specs.embedding);
  for (int64_t i = decoder->layer_range_.begin; i < decoder->layer_range_.end; ++i) {
    for (const WeightSpec& spec : SpecsOfLayer(specs.layers[i])) builder.Expect(spec);
  }
  if (groups.last_stage()) {
    for (const WeightSpec& spec : SpecsOfFinalNorm(specs)) builder.Expect(spec);
    if (!head_is_embedding) builder.Expect(specs.head);
  }
  if (groups.first_stage()) {
    RETURN_IF_ERROR(builder.Linear({&specs.embedding}, decoder->embedding_));
    decoder->embedding_begin_ = PieceOfSpec(specs.embedding, tp, tp_size).begin;
  }
  decoder->layers_.resize(decoder->layer_range_.size());
  for (int64_t i = 0; i < decoder->layer_range_.size(); ++i) {
    const int64_t index = decoder->layer_range_.begin + i;
    RETURN_IF_ERROR(builder.LoadLayer(index, specs.layers[index], decoder->layers_[i]));
  }
  if (groups.last_stage()) {
    RETURN_IF_ERROR(builder.Norm(specs.final_norm, specs.final_norm_bias, decoder->final_norm_));
    if (head_is_embedding) {
      decoder->head_ = decoder->embedding_;
    } else {
      RETURN_IF_ERROR(builder.Linear({&specs.head}, decoder->head_));
    }
  }
  RETURN_IF_ERROR(builder.RotationTable());
  RETURN_IF_ERROR(builder.Activations());
  RETURN_IF_ERROR(builder.MatMulRoom());
  return decoder;
}

}  // namespace trireme
