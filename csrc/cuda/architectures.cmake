# What CUDA code is compiled for, of DINOV2_FAST_CUDA_ARCHS: sets cuda_archs. Machine code of each
# listed architecture, and PTX of the newest that is not of one chip ("90a"): later GPUs run it. A
# GPU of 8.6 or 8.9 runs the machine code of 80, so with 90 beside it PTX of 80 would serve none.
set(cuda_archs "$ENV{DINOV2_FAST_CUDA_ARCHS}")
if(NOT cuda_archs)
  set(cuda_archs "80;90")
endif()
set(newest 0)
foreach(arch IN LISTS cuda_archs)
  if(NOT arch MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "DINOV2_FAST_CUDA_ARCHS: expected 80 and later numbers between semicolons, "
                        "for instance 80;90 or 90a, got '$ENV{DINOV2_FAST_CUDA_ARCHS}'")
  endif()
  if(arch MATCHES "^([0-9]+)(-virtual)?$" AND CMAKE_MATCH_1 GREATER newest)
    set(newest ${CMAKE_MATCH_1})
  endif()
endforeach()
list(TRANSFORM cuda_archs REPLACE "^([0-9]+)$" "\\1-real")
list(APPEND cuda_archs "${newest}-virtual")
list(REMOVE_ITEM cuda_archs "0-virtual") # only machine code was asked for, or only of one chip
list(REMOVE_DUPLICATES cuda_archs)
