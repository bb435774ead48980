#include "parallel/staged_communicator.h"

#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/check.h"

namespace trireme {
namespace {

class StagedCommunicator final : public Communicator {
 public:
  explicit StagedCommunicator(std::unique_ptr<Communicator> host) : host_(std::move(host)) {
    rank_ = host_->rank();
    size_ = host_->size();
  }

  void DoAllReduceSum(Stream& stream, TensorView data) override {
    if (size_ == 1 || data.elements() == 0) return;
    CHECK(data.contiguous());
    const TensorView staged(Fetch(stream, data, in_), data.dtype, data.shape);
    host_->AllReduceSum(stream, staged);
    stream.Copy(data.data, staged.data, static_cast<size_t>(data.bytes()));
    Finish(stream);
  }
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    CHECK(in.contiguous() && out.contiguous());
    if (out.elements() == 0) return;
    const ConstTensorView staged(Fetch(stream, in, in_), in.dtype, in.shape);
    out_.resize(static_cast<size_t>(out.bytes()));
    host_->AllGather(stream, staged, TensorView(out_.data(), out.dtype, out.shape));
    stream.Copy(out.data, out_.data(), out_.size());
    Finish(stream);
  }
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    CHECK(data.contiguous());
    std::vector<char> buffer;
    const ConstTensorView staged(Fetch(stream, data, buffer), data.dtype, data.shape);
    const int64_t ticket = host_->Send(stream, staged, peer);
    sent_.emplace(ticket, std::move(buffer));  // its bytes stay where they are
    moved();
    return ticket;
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override {
    host_->WaitSend(stream, ticket);
    sent_.erase(ticket);
  }
  void DoRecv(Stream& stream, TensorView data, int peer) override {
    CHECK(data.contiguous());
    out_.resize(static_cast<size_t>(data.bytes()));
    host_->Recv(stream, TensorView(out_.data(), data.dtype, data.shape), peer);
    stream.Copy(data.data, out_.data(), out_.size());
    Finish(stream);
  }

 private:
  // The view's bytes on the host, in `buffer`.
  static char* Fetch(Stream& stream, ConstTensorView view, std::vector<char>& buffer) {
    buffer.resize(static_cast<size_t>(view.bytes()));
    stream.Copy(buffer.data(), view.data, buffer.size());
    stream.Synchronize().IgnoreError();  // it says so again to who waits for the stream
    return buffer.data();
  }
  // The staging buffers are free again afterwards.
  void Finish(Stream& stream) {
    stream.Synchronize().IgnoreError();
    moved();
  }
  void moved() { bytes_moved_ = host_->bytes_moved(); }

  std::unique_ptr<Communicator> host_;
  std::vector<char> in_, out_;
  std::unordered_map<int64_t, std::vector<char>> sent_;  // by ticket
};

}  // namespace

std::unique_ptr<Communicator> NewStagedCommunicator(std::unique_ptr<Communicator> host) {
  return std::make_unique<StagedCommunicator>(std::move(host));
}

}  // namespace trireme
