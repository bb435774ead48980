#include "parallel/rank_links.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "parallel/control_plane.h"
#include "parallel/flight_recorder.h"

namespace trireme {
namespace {

// One address of a peer that is filtered somewhere must not use up the time of the others.
constexpr int kConnectMs = 2000;
// Of a job whose ranks all came out of a collective a moment ago.
constexpr int64_t kAllConnectedNs = 20'000'000'000;
constexpr size_t kSecretBytes = 16;
constexpr size_t kMaxMessage = 1 << 20;
constexpr size_t kMaxKept = 1 << 20;  // per peer

struct Hello {
  char secret[kSecretBytes];
  int32_t rank;
};
struct FrameHeader {
  uint32_t bytes;
  uint32_t type;
};

std::string FirstLine(const char* path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// Two processes with the same text share a kernel and the namespace ("net", "pid").
std::string NamespaceOf(const char* kind) {
  struct stat info;
  const std::string path = absl::StrCat("/proc/self/ns/", kind);
  if (stat(path.c_str(), &info) != 0) return "";
  return absl::StrCat(FirstLine("/proc/sys/kernel/random/boot_id"), "/", info.st_ino);
}

// Numeric, of interfaces that are up.
std::vector<std::string> OwnAddresses() {
  std::vector<std::string> out;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return out;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || (i->ifa_flags & IFF_UP) == 0 || (i->ifa_flags & IFF_LOOPBACK))
      continue;
    char text[INET6_ADDRSTRLEN] = {};
    if (i->ifa_addr->sa_family == AF_INET) {
      inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(i->ifa_addr)->sin_addr, text,
                sizeof(text));
    } else if (i->ifa_addr->sa_family == AF_INET6) {
      const in6_addr& address = reinterpret_cast<sockaddr_in6*>(i->ifa_addr)->sin6_addr;
      if (IN6_IS_ADDR_LINKLOCAL(&address)) continue;  // means nothing elsewhere
      inet_ntop(AF_INET6, &address, text, sizeof(text));
    }
    if (text[0] != '\0') out.push_back(text);
  }
  freeifaddrs(list);
  return out;
}

// What a rank tells all others.
struct Address {
  std::string net, pid;  // namespaces
  int port = 0;
  std::vector<std::string> numeric;
  std::string card;

  std::string Pack() const {
    return absl::StrCat(net, "\n", pid, "\n", port, "\n", absl::StrJoin(numeric, ","), "\n", card);
  }
  static Address Parse(const std::string& text) {
    const std::vector<std::string> lines = absl::StrSplit(text, absl::MaxSplits('\n', 4));
    CHECK_EQ(lines.size(), 5u);
    Address out{lines[0], lines[1], std::atoi(lines[2].c_str()), {}, lines[4]};
    if (!lines[3].empty()) out.numeric = absl::StrSplit(lines[3], ',');
    return out;
  }
};

// Closed by its owner's end.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(Socket&& other) noexcept : fd_(other.Release()) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int fd() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// Ready within the time? Signals do not shorten it.
bool WaitFor(int fd, short events, int64_t deadline_ns) {
  while (true) {
    const int64_t left_ms = std::max<int64_t>(0, (deadline_ns - MonotonicNs()) / 1'000'000);
    pollfd one{fd, events, 0};
    const int ready = poll(&one, 1, static_cast<int>(left_ms));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

absl::StatusOr<Socket> Listen(bool loopback, int* port) {
  // Where IPv6 is there, its sockets take IPv4 as well.
  for (const int family : {loopback ? AF_INET : AF_INET6, AF_INET}) {
    Socket socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (socket.fd() < 0) continue;
    sockaddr_storage address{};
    socklen_t length = sizeof(sockaddr_in);
    address.ss_family = static_cast<sa_family_t>(family);
    if (family == AF_INET6) {
      const int off = 0;
      setsockopt(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
      length = sizeof(sockaddr_in6);
    } else if (loopback) {
      reinterpret_cast<sockaddr_in*>(&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    }
    auto* const generic = reinterpret_cast<sockaddr*>(&address);
    if (bind(socket.fd(), generic, length) != 0 || listen(socket.fd(), SOMAXCONN) != 0 ||
        getsockname(socket.fd(), generic, &length) != 0)
      continue;
    *port = ntohs(family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                     : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
    return socket;
  }
  return absl::UnavailableError(
      absl::StrCat("no TCP port for the failure detector: ", std::strerror(errno)));
}

Socket ConnectTo(const std::string& numeric, int port) {
  sockaddr_storage address{};
  socklen_t length = 0;
  auto* const v4 = reinterpret_cast<sockaddr_in*>(&address);
  auto* const v6 = reinterpret_cast<sockaddr_in6*>(&address);
  if (inet_pton(AF_INET, numeric.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
    length = sizeof(*v4);
  } else if (inet_pton(AF_INET6, numeric.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(static_cast<uint16_t>(port));
    length = sizeof(*v6);
  }
  if (length == 0) return Socket();
  Socket socket(::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket.fd() < 0) return Socket();
  const int64_t deadline = MonotonicNs() + int64_t{kConnectMs} * 1'000'000;
  if (connect(socket.fd(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    int error = 0;
    socklen_t size = sizeof(error);
    if (errno != EINPROGRESS || !WaitFor(socket.fd(), POLLOUT, deadline) ||
        getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0)
      return Socket();
  }
  return socket;
}

void SetOptions(int fd, int64_t silence_ms) {
  const auto set = [fd](int level, int option, int value) {
    setsockopt(fd, level, option, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 2);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(IPPROTO_TCP, TCP_KEEPCNT, 4);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(silence_ms));
}

// The rank whose hello this is, -1 for a stranger.
int ReadHello(int fd, const std::string& secret, int64_t deadline_ns) {
  Hello hello;
  size_t done = 0;
  while (done < sizeof(hello)) {
    if (!WaitFor(fd, POLLIN, deadline_ns)) return -1;
    const ssize_t n = recv(fd, reinterpret_cast<char*>(&hello) + done, sizeof(hello) - done, 0);
    if (n <= 0) return -1;
    done += static_cast<size_t>(n);
  }
  return std::memcmp(hello.secret, secret.data(), kSecretBytes) == 0 ? hello.rank : -1;
}

}  // namespace

RankLinks::RankLinks(int ranks) : same_host_(ranks), links_(ranks) {}

RankLinks::~RankLinks() {
  for (Link& link : links_) {
    if (link.fd >= 0) close(link.fd);
  }
}

absl::StatusOr<std::unique_ptr<RankLinks>> RankLinks::Connect(ControlPlane& control,
                                                              const Options& options) {
  const int self = control.rank(), ranks = control.size();
  std::unique_ptr<RankLinks> links(new RankLinks(ranks));
  std::string secret(kSecretBytes, '\0');
  if (self == 0 && getrandom(secret.data(), secret.size(), 0) != ssize_t{kSecretBytes})
    secret = absl::StrCat(MonotonicNs(), "                ").substr(0, kSecretBytes);
  control.Broadcast(&secret);

  Address mine{NamespaceOf("net"), NamespaceOf("pid"), 0, OwnAddresses(), options.card};
  absl::StatusOr<Socket> listener = Listen(control.local_size() == ranks, &mine.port);
  RETURN_IF_ERROR(control.Agree(listener.status()));
  std::vector<Address> addresses;
  for (const std::string& text : control.AllGather(mine.Pack())) {
    addresses.push_back(Address::Parse(text));
    links->cards_.push_back(addresses.back().card);
    links->same_host_[addresses.size() - 1] = addresses.back().pid == mine.pid;
  }

  // To the watchers below; the system takes connections for those that have not come to accept yet.
  absl::Status status;
  for (int peer = 0; peer < std::min(self, kWatchers) && status.ok(); ++peer) {
    std::vector<std::string> targets = addresses[peer].numeric;
    if (addresses[peer].net == mine.net) targets.insert(targets.begin(), "127.0.0.1");
    Socket socket;
    for (size_t i = 0; i < targets.size() && socket.fd() < 0; ++i)
      socket = ConnectTo(targets[i], addresses[peer].port);
    Hello hello;
    std::memcpy(hello.secret, secret.data(), kSecretBytes);
    hello.rank = self;
    if (socket.fd() < 0 ||
        send(socket.fd(), &hello, sizeof(hello), MSG_NOSIGNAL) != ssize_t{sizeof(hello)}) {
      status = absl::UnavailableError(absl::StrCat(
          "rank ", self, " (", control.host(), ") cannot connect to rank ", peer, " at ",
          absl::StrJoin(targets, " or "), " port ", addresses[peer].port,
          ": the failure detector needs TCP between the hosts; open it, or give --failure-timeout "
          "0 to go without"));
      break;
    }
    links->links_[peer].fd = socket.Release();
  }
  // From every rank above, when this one is a watcher.
  int expected = self < kWatchers ? ranks - self - 1 : 0;
  const int64_t deadline = MonotonicNs() + kAllConnectedNs;
  while (status.ok() && expected > 0) {
    if (!WaitFor(listener->fd(), POLLIN, deadline)) {
      status = absl::DeadlineExceededError(
          absl::StrCat("rank ", self, " (", control.host(), "): ", expected,
                       " ranks did not connect to the failure detector; give --failure-timeout 0 "
                       "to go without"));
      break;
    }
    Socket socket(accept4(listener->fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket.fd() < 0) continue;
    const int peer =
        ReadHello(socket.fd(), secret, MonotonicNs() + int64_t{kConnectMs} * 1'000'000);
    if (peer <= self || peer >= ranks || links->links_[peer].fd >= 0) continue;
    links->links_[peer].fd = socket.Release();
    --expected;
  }
  for (const Link& link : links->links_) {
    if (link.fd >= 0) SetOptions(link.fd, options.silence_ms);
  }
  RETURN_IF_ERROR(control.Agree(status));
  return links;
}

void RankLinks::Send(int rank, uint8_t type, std::string_view bytes) {
  Link& link = links_[rank];
  if (link.fd < 0 || link.out.size() > kMaxKept) return;
  const FrameHeader header{static_cast<uint32_t>(bytes.size()), type};
  link.out.append(reinterpret_cast<const char*>(&header), sizeof(header));
  link.out.append(bytes);
  Flush(rank);
}

void RankLinks::Flush(int rank) {
  Link& link = links_[rank];
  while (!link.out.empty()) {
    const ssize_t n = send(link.fd, link.out.data(), link.out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    // What is wrong with a connection comes up when it is read.
    if (n <= 0) return;
    link.out.erase(0, static_cast<size_t>(n));
  }
}

// The error that is still with the connection, if any.
int RankLinks::Close(int rank) {
  Link& link = links_[rank];
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(link.fd, SOL_SOCKET, SO_ERROR, &error, &size);
  close(link.fd);
  link.fd = -1;
  link.out.clear();
  return error;
}

void RankLinks::Read(int rank, std::vector<Event>& events) {
  Link& link = links_[rank];
  char piece[16384];
  int closed = -1;
  while (true) {
    const ssize_t n = recv(link.fd, piece, sizeof(piece), MSG_DONTWAIT);
    if (n > 0) {
      link.in.append(piece, static_cast<size_t>(n));
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    closed = n == 0 ? 0 : errno;
    break;
  }
  size_t at = 0;
  while (link.in.size() - at >= sizeof(FrameHeader)) {
    FrameHeader header;
    std::memcpy(&header, link.in.data() + at, sizeof(header));
    CHECK_LE(header.bytes, kMaxMessage) << "from rank " << rank;
    if (link.in.size() - at - sizeof(header) < header.bytes) break;
    events.push_back({rank, static_cast<uint8_t>(header.type), 0,
                      link.in.substr(at + sizeof(header), header.bytes)});
    at += sizeof(header) + header.bytes;
  }
  link.in.erase(0, at);
  if (closed >= 0) {
    const int error = Close(rank);
    events.push_back({rank, kClosed, closed != 0 ? closed : error, ""});
  }
}

std::vector<RankLinks::Event> RankLinks::Wait(int timeout_ms, std::span<pollfd> others) {
  std::vector<pollfd> waits(others.begin(), others.end());
  std::vector<int> owners;
  for (size_t rank = 0; rank < links_.size(); ++rank) {
    if (links_[rank].fd < 0) continue;
    const short events = links_[rank].out.empty() ? POLLIN : POLLIN | POLLOUT;
    waits.push_back({links_[rank].fd, events, 0});
    owners.push_back(static_cast<int>(rank));
  }
  std::vector<Event> events;
  const int ready = poll(waits.data(), waits.size(), timeout_ms);
  for (size_t i = 0; i < others.size(); ++i) others[i].revents = ready > 0 ? waits[i].revents : 0;
  if (ready <= 0) return events;
  for (size_t i = 0; i < owners.size(); ++i) {
    const short happened = waits[others.size() + i].revents;
    if ((happened & POLLOUT) != 0) Flush(owners[i]);
    if ((happened & (POLLIN | POLLERR | POLLHUP)) != 0) Read(owners[i], events);
  }
  return events;
}

}  // namespace trireme
