# Two images: docker build --target cpu -t align:cpu .   and   --target gpu -t align:gpu .
#   docker run --rm -it -v "$PWD":/work align:cpu run quickstart
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD":/work align:gpu run recipe.yaml
# The repository's own installer makes the environment, so that image and checkout have the same set.
# Built so far: the cpu image, on 2026-11-28 by buildah 1.28 (chroot isolation, no daemon), from a Debian bookworm
# root of debootstrap with Debian's Python 3.11 in place of PYTHON_IMAGE, and with a CPU build of torch (4.84 GB).
# The gpu image was not built: its Python packages resolve under the constraints file; no more is known.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# nvcc compiles DeepSpeed's operators; torch brings its own CUDA libraries.
ARG CUDA_IMAGE=nvidia/cuda:12.9.1-devel-ubuntu22.04

FROM ${PYTHON_IMAGE} AS cpu
# A package that asks a question would stop the build.
ARG DEBIAN_FRONTEND=noninteractive
# g++ compiles the collective of two CPU ranks; numactl binds ranks to cores.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make numactl \
    && rm -rf /var/lib/apt/lists/*
# An index with torch's CPU builds, without which the image has gigabytes of CUDA libraries:
#   docker build --build-arg TORCH_INDEX=URL ...
ARG TORCH_INDEX=
WORKDIR /opt/align
COPY . .
RUN ALIGN_VLLM=cpu bash scripts/setup.sh && rm -rf /root/.cache
ENV PATH=/opt/align/.venv/bin:$PATH DS_ACCELERATOR=cpu
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]

FROM ${CUDA_IMAGE} AS gpu
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends \
    g++ git make numactl python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/align
COPY . .
RUN PYTHON=python3.11 ALIGN_VLLM=gpu bash scripts/setup.sh && rm -rf /root/.cache
ENV PATH=/opt/align/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["align"]
CMD ["--help"]
