# Read by CMake after ggml's project() (CMAKE_PROJECT_ggml_INCLUDE); what is deferred runs when ggml's targets are there.

function(use_own_barrier)
    if(NOT TARGET ggml-cpu OR NOT GGML_OPENMP_ENABLED)
        return()
    endif()
    target_sources(ggml-cpu PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/barrier.c")
    target_link_options(ggml-cpu PRIVATE "LINKER:--wrap=GOMP_barrier,--wrap=GOMP_parallel")
endfunction()

cmake_language(DEFER CALL use_own_barrier)
