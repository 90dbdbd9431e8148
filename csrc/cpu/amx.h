// Whether products use the tiles of AMX (cpu/tiles.h).
#pragma once

#include <string>

namespace qk::cpu {

enum class Tiles { none, portable, amx };

// What is in use: AMX where the machine has it, the system permits it, and QATKERNELS_AMX is not 0. Throws
// std::runtime_error if QATKERNELS_AMX is neither 0 nor 1.
Tiles tiles();

const char* name_of(Tiles tiles);

// For tests: from now on tiles() is "none", "portable" or "amx"; returns the name of what was in use. Throws
// std::invalid_argument for another name, or if the machine has no AMX.
const char* use_tiles(const std::string& name);

}  // namespace qk::cpu
