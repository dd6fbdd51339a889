{{/*
Every workload of the release, as data: `include "baton.workloads" . | fromYaml`, key `items`. The other templates go through this list; none
looks at .Values.models itself, but for what belongs to a model and not to a workload.
*/}}

{{- define "baton.workloads" -}}
items:
{{- if not .Values.etcd.endpoints }}
{{ include "baton.workload.etcd" . }}
{{- end }}
{{- range $model, $spec := .Values.models }}
{{- $versions := include "baton.versions" $spec | fromYaml }}
{{- if not $versions.items }}{{ fail (printf "models.%s: give it a path, or versions with a path each" $model) }}{{ end }}
{{- $kvstore := include "baton.merge" (list $.Values.kvstore $spec.kvstore) | fromJson }}
{{- $node := include "baton.merge" (list $.Values.pod $kvstore.node) | fromJson }}
{{- $master := include "baton.merge" (list $.Values.pod $kvstore.master) | fromJson }}
{{- $cluster := dict "root" $ "model" $model "spec" $spec "kvstore" $kvstore "node" $node "master" $master "ha" (gt (int $master.replicas) 1) }}
{{- $router := include "baton.merge" (list $.Values.pod $.Values.router $spec.router) | fromJson }}
{{ include "baton.workload.router" (merge (dict "block" $router "version" (first $versions.items)) $cluster) }}
{{- range $version := $versions.items }}
{{- $blocks := dict }}
{{- range $role := list "prefill" "decode" "unified" }}
{{- $layers := list $.Values.pod $.Values.worker (get $.Values $role) $spec.worker (get $spec $role) $version.worker (get $version $role) }}
{{- $block := include "baton.merge" $layers | fromJson }}
{{- if $block.enabled }}
{{- $_ := set $blocks $role $block }}
{{ include "baton.workload.worker" (merge (dict "role" $role "block" $block "version" $version) $cluster) }}
{{- end }}
{{- end }}
{{- include "baton.check.pair" (dict "model" $model "blocks" $blocks) }}
{{- end }}
{{- if $kvstore.enabled }}
{{ include "baton.workload.master" $cluster }}
{{ include "baton.workload.node" $cluster }}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.versions" -}}{{/* a model's weights: its own, without a name, and those under `versions` */}}
items:
{{- if .path }}
{{ list (dict "name" "" "path" .path "fetch" .fetch) | toYaml }}
{{- end }}
{{- range $name, $version := .versions }}
{{ list (include "baton.merge" (list $version (dict "name" $name)) | fromJson) | toYaml }}
{{- end }}
{{- end }}

{{- define "baton.check.pair" -}}
{{- $blocks := .blocks }}
{{- if not (or (hasKey $blocks "unified") (and (hasKey $blocks "prefill") (hasKey $blocks "decode"))) }}
{{- fail (printf "models.%s: enable prefill and decode, or unified" .model) }}
{{- end }}
{{- if and (hasKey $blocks "prefill") (hasKey $blocks "decode") }}
{{- $prefill := $blocks.prefill.settings.engine | default dict }}
{{- $decode := $blocks.decode.settings.engine | default dict }}
{{- range $key := list "block_size" "dtype" "load_format" }}
{{- if ne (get $prefill $key | toString) (get $decode $key | toString) }}
{{- fail (printf "models.%s: prefill and decode differ in settings.engine.%s, so they could not exchange KV; set it under `worker`" $.model $key) }}
{{- end }}
{{- end }}
{{- if and (not $prefill.block_size) (ne (gt (int $blocks.prefill.gpus) 0) (gt (int $blocks.decode.gpus) 0)) }}
{{- fail (printf "models.%s: one of prefill and decode has GPUs and the other has not; set worker.settings.engine.block_size and dtype, which would differ" .model) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.cluster" -}}{{/* the settings that all processes of a model share */}}
name: {{ list .root.Release.Namespace .root.Release.Name .model | join "." }}
etcd: {{ include "baton.etcd" .root | quote }}
etcd_access: {{ include "baton.etcdAccess" .root }}
lease_s: {{ .spec.leaseSeconds | default 5 }}
{{- end }}

{{- define "baton.servedNames" -}}{{/* the first is shown */}}
{{- $names := .spec.servedName | default .model }}
{{- ternary $names (list $names) (kindIs "slice" $names) | toJson }}
{{- end }}

{{- define "baton.ports.grpc" -}}
- {name: grpc, containerPort: 9100}
- {name: metrics, containerPort: 9101}
{{- end }}

{{- define "baton.probes" -}}
startup: {httpGet: {path: /health, port: metrics}}
readiness: {httpGet: {path: /ready, port: metrics}}
liveness: {httpGet: {path: /health, port: metrics}}
{{- end }}

{{- define "baton.workload.router" -}}
{{- $own := dict "model" .version.path "served_model_name" (include "baton.servedNames" . | fromYamlArray) "http_port" 8000 "drain_grace_s" .block.drainSeconds }}
{{- $_ := set $own "cluster" (include "baton.cluster" . | fromYaml) }}
{{- $_ := set $own "security" (include "baton.security" .root | fromYaml) }}
{{- $_ := set $own "server" (dict "host" "0.0.0.0" "grpc_port" 9000 "metrics_port" 9101 "log_format" .root.Values.logFormat) -}}
- name: {{ include "baton.name" (dict "root" .root "model" .model "version" "" "component" "router") }}
  component: router
  model: {{ .model | quote }}
  kind: Deployment
  image: {{ include "baton.image" (dict "root" .root "image" .block.image "kind" "router") }}
  args: [router, --config, /etc/baton/config.yaml]
  ports:
    - {name: http, containerPort: 8000}
    - {name: grpc, containerPort: 9000}
    - {name: metrics, containerPort: 9101}
  probes:
    startup: {httpGet: {path: /health, port: http}}
    readiness: {httpGet: {path: /ready, port: http}}
    liveness: {httpGet: {path: /health, port: http}}
  preStopSeconds: 10
  addressKeys: [BATON_SERVER__ADVERTISE]
  weights: {{ toJson .version }}
  config: {{ include "baton.merge" (list .block.settings $own) }}
  block: {{ toJson .block }}
{{- end }}

{{- define "baton.workload.worker" -}}
{{- $pool := dict }}
{{- if .kvstore.enabled }}
{{- $address := printf "%s:50051" (include "baton.name" (dict "root" .root "model" .model "version" "" "component" "kvstore")) }}
{{- $pool = dict "master" (ternary "etcd" $address .ha) "protocol" (ternary "rdma" "tcp" (not (empty .node.rdma.resource))) }}
{{- if and .node.rdma.resource (not .block.rdma.resource) }}
{{- fail (printf "models.%s: kvstore.node has RDMA and %s has not: give both rdma.resource, or none" .model .role) }}
{{- end }}
{{- $near := (.block.settings.pool | default dict).near }}
{{- $same := eq $near ((.node.settings.pool | default dict).near) }}
{{- if and $near $same (ne (include "baton.asRoot" .block) (include "baton.asRoot" .node)) }}
{{- fail (printf "models.%s: %s and kvstore.node share pool.near, and one of them is root, by rdma.root: memory is lent to the same user alone" .model .role) }}
{{- end }}
{{- end }}
{{- $push := dict }}
{{- if .block.rdma.resource }}
{{- $push = dict "protocols" (list "rdma" "tcp") "devices" .block.rdma.devices }}
{{- if $pool }}{{ $_ := set $pool "devices" .block.rdma.devices }}{{ end }}
{{- end }}
{{- $own := dict "role" .role "model" .version.path "served_model_name" (include "baton.servedNames" . | fromYamlArray) "drain_grace_s" .block.drainSeconds }}
{{- $_ := set $own "cluster" (include "baton.cluster" . | fromYaml) }}
{{- $_ := set $own "security" (include "baton.security" .root | fromYaml) }}
{{- $_ := set $own "server" (dict "grpc_port" 9100 "metrics_port" 9101 "log_format" .root.Values.logFormat) }}
{{- if .block.fileTier.bytes }}
{{- $_ := set $own "files" (dict "path" "/kv" "bytes" .block.fileTier.bytes "shared" .block.fileTier.shared) }}
{{- end }}
{{- $engine := .block.settings.engine | default dict }}
{{- $requests := .block.resources.requests | default dict }}
{{- $derived := dict "pool" $pool "push" $push }}
{{- if gt (int .block.gpus) 1 }}{{ $_ := set $derived "engine" (dict "tensor_parallel_size" (int .block.gpus)) }}{{ end }}
{{- $config := include "baton.merge" (list $derived .block.settings $own) -}}
- name: {{ include "baton.name" (dict "root" .root "model" .model "version" .version.name "component" .role) }}
  component: {{ .role }}
  model: {{ .model | quote }}
  version: {{ .version.name | quote }}
  kind: Deployment
  image: {{ include "baton.image" (dict "root" .root "image" .block.image "kind" (ternary "worker-cuda" "worker-cpu" (gt (int .block.gpus) 0))) }}
  args: [{{ ternary "prefill" "decode" (eq .role "prefill") }}, --config, /etc/baton/config.yaml]
  ports:
    {{- include "baton.ports.grpc" . | nindent 4 }}
  probes:
    {{- include "baton.probes" . | nindent 4 }}
  addressKeys: [BATON_SERVER__HOST, BATON_POOL__HOST]
  threadsByRequest: {{ and (eq (int .block.gpus) 0) (not $engine.num_threads) (not $engine.tensor_parallel_size) (hasKey $requests "cpu") }}
  weights: {{ toJson .version }}
  config: {{ $config }}
  block: {{ toJson .block }}
{{- end }}

{{- define "baton.workload.master" -}}
{{- $asks := or (include "baton.etcdTLS" .root) .root.Values.etcd.access.user (hasPrefix "https:" (include "baton.etcd" .root)) }}
{{- if and .ha $asks }}
{{- fail (printf "models.%s: kvstore.master.replicas: several masters agree by etcd, to which Mooncake speaks without certificates and passwords; take one master, or an etcd that asks for neither (security.tls.etcd=false) behind NetworkPolicies" .model) }}
{{- end }}
{{- $own := dict "mode" "master" "ha" .ha "master_port" 50051 "master_metrics_port" 9003 "drain_grace_s" .master.drainSeconds }}
{{- $_ := set $own "cluster" (include "baton.cluster" . | fromYaml) }}
{{- $_ := set $own "security" (include "baton.security" .root | fromYaml) }}
{{- $_ := set $own "server" (dict "grpc_port" 9100 "metrics_port" 9101 "log_format" .root.Values.logFormat) -}}
- name: {{ include "baton.name" (dict "root" .root "model" .model "version" "" "component" "kvstore-master") }}
  component: kvstore-master
  model: {{ .model | quote }}
  kind: StatefulSet
  ha: {{ .ha }}
  image: {{ include "baton.image" (dict "root" .root "image" .master.image "kind" "kvstore") }}
  args: [kvstore, --config, /etc/baton/config.yaml]
  ports:
    {{- include "baton.ports.grpc" . | nindent 4 }}
    - {name: master, containerPort: 50051}
    - {name: admin, containerPort: 9003}
  probes:
    {{- include "baton.probes" . | nindent 4 }}
    readiness: {httpGet: {path: /health, port: admin}}
  addressKeys: [BATON_SERVER__HOST, BATON_POOL__HOST]
  config: {{ include "baton.merge" (list .master.settings $own) }}
  block: {{ toJson .master }}
{{- end }}

{{- define "baton.workload.node" -}}
{{- $masters := include "baton.name" (dict "root" .root "model" .model "version" "" "component" "kvstore-master") }}
{{- $single := include "baton.name" (dict "root" .root "model" .model "version" "" "component" "kvstore") }}
{{- $admins := list (printf "%s:9003" $single) }}
{{- if .ha }}
{{- $admins = list }}
{{- range $i := until (int .master.replicas) }}{{ $admins = append $admins (printf "%s-%d.%s:9003" $masters $i $masters) }}{{ end }}
{{- end }}
{{- $pool := dict "master" (ternary "etcd" (printf "%s:50051" $single) .ha) "protocol" "tcp" }}
{{- if .node.rdma.resource }}
{{- $pool = merge (dict "protocol" "rdma" "devices" .node.rdma.devices) $pool }}
{{- end }}
{{- $own := dict "mode" "node" "memory" .node.memory "masters" $admins "pool" $pool "drain_grace_s" .node.drainSeconds }}
{{- $_ := set $own "cluster" (include "baton.cluster" . | fromYaml) }}
{{- $_ := set $own "security" (include "baton.security" .root | fromYaml) }}
{{- $_ := set $own "server" (dict "grpc_port" 9100 "metrics_port" 9101 "log_format" .root.Values.logFormat) }}
{{- with .master.settings.client_ttl_s }}{{ $_ := set $own "client_ttl_s" . }}{{ end }}
{{- $disk := .node.storage.size }}
{{- if $disk }}
{{- $_ := set $own "disk" (dict "path" "/kv" "bytes" (printf "%dMi" (div (mul (include "baton.mebibytes" $disk | int64) 85) 100))) }}
{{- end }}
{{- $beside := 1024 }}{{/* MiB: the process; with a disk its buffer, and 0.7 KB for each block, taken to be 0.5 MB */}}
{{- if $disk }}{{ $beside = add 1536 (div (include "baton.mebibytes" $disk | int64) 700) }}{{ end }}
{{- $memory := printf "%dMi" (add (include "baton.mebibytes" .node.memory | int64) $beside) }}
{{- $probes := include "baton.probes" . | fromYaml }}
{{- if $disk }}{{/* while Mooncake looks through it, nothing else in the process runs */}}
{{- $_ := set $probes.liveness "failureThreshold" (div (add (int .node.startupSeconds) 9) 10) }}
{{- end }}
{{- $sizes := dict "requests" (dict "memory" $memory) "limits" (dict "memory" $memory) }}
{{- $block := include "baton.merge" (list .node (dict "resources" $sizes)) -}}
- name: {{ include "baton.name" (dict "root" .root "model" .model "version" "" "component" "kvstore-node") }}
  component: kvstore-node
  model: {{ .model | quote }}
  kind: StatefulSet
  image: {{ include "baton.image" (dict "root" .root "image" .node.image "kind" "kvstore") }}
  args: [kvstore, --config, /etc/baton/config.yaml]
  ports:
    {{- include "baton.ports.grpc" . | nindent 4 }}
  probes: {{ toJson $probes }}
  addressKeys: [BATON_SERVER__HOST, BATON_POOL__HOST]
  config: {{ include "baton.merge" (list .node.settings $own) }}
  {{- if $disk }}
  storage: {{ merge (dict "path" "/kv" "temporary" true) .node.storage | toJson }}
  {{- end }}
  block: {{ $block }}
{{- end }}

{{- define "baton.workload.etcd" -}}
{{- $name := include "baton.name" (dict "root" . "model" "" "version" "" "component" "etcd") }}
{{- $tls := not (empty (include "baton.etcdTLS" .)) }}
{{- $scheme := ternary "https" "http" $tls }}
{{- $peers := list }}
{{- range $i := until (int .Values.etcd.replicas) }}{{ $peers = append $peers (printf "%s-%d=%s://%s-%d.%s:2380" $name $i $scheme $name $i $name) }}{{ end }}
{{- if and (gt (int .Values.etcd.replicas) 1) (not .Values.etcd.storage.size) }}
{{- fail "etcd: a member of several that restarts without its data cannot join again: give etcd.storage.size, or etcd.replicas=1" }}
{{- end }}
{{- $block := include "baton.merge" (list .Values.pod .Values.etcd) -}}
- name: {{ $name }}
  component: etcd
  kind: StatefulSet
  image: {{ .Values.etcd.image }}
  command: [/usr/local/bin/etcd]
  args:
    - --name=$(POD_NAME)
    - --data-dir=/var/lib/etcd/data
    - --listen-client-urls={{ $scheme }}://$(POD_IP):2379
    - --advertise-client-urls={{ $scheme }}://$(POD_NAME).{{ $name }}:2379
    - --listen-peer-urls={{ $scheme }}://$(POD_IP):2380
    - --initial-advertise-peer-urls={{ $scheme }}://$(POD_NAME).{{ $name }}:2380
    - --listen-metrics-urls=http://$(POD_IP):9101
    {{- range $who := ternary (list "" "peer-") list $tls }}
    - --{{ $who }}cert-file=/etc/baton-tls/tls.crt
    - --{{ $who }}key-file=/etc/baton-tls/tls.key
    - --{{ $who }}trusted-ca-file=/etc/baton-tls/ca.crt
    - --{{ $who }}client-cert-auth=true
    {{- end }}
    {{- if $tls }}
    - --experimental-peer-skip-client-san-verification=true
    {{- end }}
    - --initial-cluster={{ join "," $peers }}
    - --initial-cluster-token={{ .Release.Namespace }}-{{ .Release.Name }}
    - --auto-compaction-mode=periodic
    - --auto-compaction-retention=10m
    - --quota-backend-bytes={{ mul (include "baton.mebibytes" .Values.etcd.quota | int64) 1048576 }}
  ports:
    - {name: client, containerPort: 2379}
    - {name: peer, containerPort: 2380}
    - {name: metrics, containerPort: 9101}
  probes:
    # Without a quorum, or with its quota used up, a member is to stay, so that somebody can help it; full, it still answers what is asked.
    startup: {tcpSocket: {port: client}}
    readiness: {httpGet: {path: "/health?exclude=NOSPACE", port: metrics}}
    liveness: {tcpSocket: {port: client}}
  storage: {{ merge (dict "path" "/var/lib/etcd") .Values.etcd.storage | toJson }}
  block: {{ $block }}
{{- end }}
