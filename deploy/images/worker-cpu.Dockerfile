# syntax=docker/dockerfile:1
# Prefill and decode workers that compute on the CPU. g++ compiles the kernels for the machine that they start on.
# From the repository's root: docker build -f deploy/images/worker-cpu.Dockerfile .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY baton ./baton
COPY services ./services
COPY deploy/images/install.sh ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN PIP_CONSTRAINT=constraints.txt pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && bash install.sh worker-cpu /wheels/*.whl /opt/baton/venv

FROM python:3.11.13-slim-bookworm
# Debian keeps one version of a package: a pinned one is gone with the next.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ tini libcurl4 libibverbs1 ibverbs-providers librdmacm1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/baton/venv /opt/baton/venv
COPY examples/demo-model /opt/baton/demo-model
ENV PATH=/opt/baton/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/baton
USER 10001:10001
# tini is process 1, so that SIGTERM ends a worker that is still loading, too.
ENTRYPOINT ["tini", "--", "baton", "serve"]
