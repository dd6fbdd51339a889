# syntax=docker/dockerfile:1
# Prefill and decode workers on NVIDIA GPUs. CUDA comes with torch, the driver from the machine; gcc is Triton's. Ray is for a
# worker on several machines (docs/kubernetes.md).
# From the repository's root: docker build -f deploy/images/worker-cuda.Dockerfile .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY baton ./baton
COPY services ./services
COPY deploy/images/install.sh ./
RUN PIP_CONSTRAINT=constraints.txt pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && bash install.sh worker-cuda /wheels/*.whl /opt/baton/venv

FROM python:3.11.13-slim-bookworm
# Debian keeps one version of a package: a pinned one is gone with the next.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ tini libcurl4 libibverbs1 ibverbs-providers librdmacm1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/baton/venv /opt/baton/venv
ENV PATH=/opt/baton/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/baton
USER 10001:10001
# tini is process 1, so that SIGTERM ends a worker that is still loading, too.
ENTRYPOINT ["tini", "--", "baton", "serve"]
