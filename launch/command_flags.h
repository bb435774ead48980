// The flags of every command, with their help and their limits.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "launch/commands.h"
#include "launch/doctor.h"

namespace trireme {

// "must be a positive number, not ..." instead of CLI11's range of 309 digits. Each wants a finite
// number: CLI11's own let NaN through.
CLI::Validator PositiveNumber();
// All of uint64_t, in decimal. For transform(), not check(): it rewrites what CLI11 would misread.
CLI::Validator SeedNumber();
CLI::Validator NotNegativeNumber();
CLI::Validator NumberBetween(double low, double high);  // both included
// Of a command that spreads its work over ranks, which watch each other.
void AddJobFlags(CLI::App* app, JobFlags* flags);
// Model and layout, memory and batching; those of a job of several ranks where `job` is there.
void AddRunFlags(CLI::App* app, ModelFlags* flags, JobFlags* job = nullptr);
void AddGenerate(CLI::App& app, GenerateFlags* flags, JobFlags* job);
void AddEval(CLI::App& app, EvalFlags* flags, JobFlags* job);
void AddBench(CLI::App* command, BenchFlags* flags, JobFlags* job);
void AddBenchServing(CLI::App* command, BenchServingFlags* flags, JobFlags* job);
CLI::App* AddDoctor(CLI::App& app, DoctorFlags* flags);
// What make-checkpoint knows, for its help.
std::string RecipeNames();

}  // namespace trireme
