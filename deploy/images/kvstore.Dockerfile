# syntax=docker/dockerfile:1
# Master and nodes of the KV pool, without torch.
# From the repository's root: docker build -f deploy/images/kvstore.Dockerfile .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY baton ./baton
COPY services ./services
COPY deploy/images/install.sh ./
RUN PIP_CONSTRAINT=constraints.txt pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && bash install.sh kvstore /wheels/*.whl /opt/baton/venv

FROM python:3.11.13-slim-bookworm
# Debian keeps one version of a package: a pinned one is gone with the next.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y tini libcurl4 libibverbs1 ibverbs-providers librdmacm1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/baton/venv /opt/baton/venv
ENV PATH=/opt/baton/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/baton
USER 10001:10001
# tini is process 1, so that SIGTERM ends a worker that is still loading, too.
ENTRYPOINT ["tini", "--", "baton", "serve"]
