// See memory.cuh.
#pragma once
