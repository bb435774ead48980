# mpirun -np N comm_bench [--device cuda] [--max-bytes B] [--ops allreduce,...]: latency and bandwidth of what moves between ranks.
add_executable(comm_bench ${CMAKE_CURRENT_LIST_DIR}/comm_bench.cc)
target_link_libraries(comm_bench PRIVATE trireme_parallel CLI11::CLI11 nlohmann_json::nlohmann_json)
