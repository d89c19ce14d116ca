#!/usr/bin/env bash
# Build the peer of the bench: llama.cpp as llama-cpp-python 0.3.36 brings it, twice (native, and with the
# AVX-512 options named one by one: its AMX build crashes in decode on some CPUs), and peer.c on each.
# peers.sh PYTHON FOLDER: leaves FOLDER/native/peer and FOLDER/named/peer.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1 folder=$2 version=0.3.36
mkdir -p "$folder"
archive=$folder/llama_cpp_python-$version.tar.gz
[ -f "$archive" ] || "$python" -m pip download -q --disable-pip-version-check --no-deps \
    --no-binary :all: -d "$folder" "llama-cpp-python==$version"
source=$folder/llama_cpp_python-$version/vendor/llama.cpp
[ -d "$source" ] || tar xzf "$archive" -C "$folder"
named=(-DGGML_NATIVE=OFF)
for feature in AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AVX2 FMA F16C BMI2; do
    named+=("-DGGML_$feature=ON")
done
build() { # name, options …
    local name=$1
    shift
    [ -f "$folder/$name/build.ninja" ] || cmake -S "$source" -B "$folder/$name" -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF "$@" >"$folder/$name.log" 2>&1
    ninja -C "$folder/$name" --quiet llama
    cc -O2 -I"$root" -I"$source/include" -I"$source/ggml/include" "$root/bench/peer.c" \
        "$root/bench/arm.c" -o "$folder/$name/peer" -L"$folder/$name/bin" -lllama -lggml \
        -lggml-base -Wl,-rpath,"$folder/$name/bin"
}
build named "${named[@]}"
build native -DGGML_NATIVE=ON
