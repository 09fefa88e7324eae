# Two images: docker build --target cpu -t align:cpu .   and   --target gpu -t align:gpu .
#   docker run --rm -it -v "$PWD":/work align:cpu run quickstart
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD":/work align:gpu run recipe.yaml
# The repository's own installer makes the environment, so that image and checkout have the same set.
# Not built so far, for want of a Docker daemon: the file was parsed (dockerfile-parse), the packages of
# the cpu image exist in Debian bookworm, and scripts/setup.sh runs there. Nothing of the gpu image was tried.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# nvcc compiles DeepSpeed's operators; torch brings its own CUDA libraries.
ARG CUDA_IMAGE=nvidia/cuda:12.9.1-devel-ubuntu22.04

FROM ${PYTHON_IMAGE} AS cpu
# A package that asks a question would stop the build.
ARG DEBIAN_FRONTEND=noninteractive
# g++ compiles the collective of two CPU ranks; numactl binds ranks to cores.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make numactl \
    && rm -rf /var/lib/apt/lists/*
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
