{{/* The one pod template: root, workload. */}}

{{- define "baton.pod" -}}
{{- $root := .root }}{{ $w := .workload }}{{ $block := .workload.block }}
{{- $spec := get $root.Values.models ($w.model | default "") | default dict }}
{{- $rdma := $block.rdma | default dict }}
{{- $asRoot := not (empty (include "baton.asRoot" $block)) }}
{{- $files := $block.fileTier | default dict }}
{{- $limits := $block.resources.limits | default dict | deepCopy }}
{{- if gt (int ($block.gpus | default 0)) 0 }}{{ $_ := set $limits $block.gpuResource (int $block.gpus) }}{{ end }}
{{- if $rdma.resource }}{{ $_ := set $limits $rdma.resource (int $rdma.count) }}{{ end }}
{{- $shm := $block.shm | default (ternary "2Gi" "" (gt (int ($block.gpus | default 0)) 1)) }}
{{- $version := $w.weights | default dict }}{{ $storage := $w.storage | default dict }}
{{- $weights := and $version (or $spec.volume $spec.claim) -}}
metadata:
  labels:
    {{- include "baton.labels" . | nindent 4 }}
    {{- with $block.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- $annotations := $block.annotations }}
  {{- with $w.config }}{{ $annotations = merge (dict "checksum/config" (toJson . | sha256sum)) $annotations }}{{ end }}
  {{- with $annotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  serviceAccountName: {{ include "baton.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (int $block.drainSeconds) (int ($w.preStopSeconds | default 0)) 20 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{ toJson . }}
  {{- end }}
  {{- with $block.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $block.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $block.nodeSelector }}
  nodeSelector: {{ toJson . }}
  {{- end }}
  {{- with $block.tolerations }}
  tolerations: {{ toJson . }}
  {{- end }}
  {{- with $block.affinity }}
  affinity: {{ toJson . }}
  {{- end }}
  {{- with $block.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - maxSkew: {{ int .maxSkew }}
      topologyKey: {{ .topologyKey }}
      whenUnsatisfiable: {{ .whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "baton.selector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: {{ not $asRoot }}
    runAsUser: {{ ternary 0 (int64 $root.Values.security.runAsUser) $asRoot }}
    runAsGroup: {{ int64 $root.Values.security.runAsUser }}
    fsGroup: {{ int64 $root.Values.security.runAsUser }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- if and $weights $version.fetch }}
  initContainers:
    - name: wait-for-weights
      image: {{ $w.image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [sh, -c, 'trap exit TERM; until [ -e "$1/config.json" ]; do echo "waiting for $1"; sleep 5 & wait $!; done', sh, {{ $version.path | quote }}]
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      resources: {requests: {cpu: 10m, memory: 16Mi}}
      volumeMounts:
        - {name: weights, mountPath: {{ $spec.mountPath | default "/models" }}, readOnly: true}
  {{- end }}
  containers:
    - name: {{ $w.component }}
      image: {{ $w.image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- with $w.command }}
      command: {{ toJson . }}
      {{- end }}
      args:
        {{- toYaml $w.args | nindent 8 }}
      env:
        {{- if $w.config }}
        - {name: BATON_SERVER__ID, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        {{- range $w.addressKeys | default (list "BATON_SERVER__HOST") }}
        - {name: {{ . }}, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        {{- if $w.threadsByRequest }}
        - {name: BATON_ENGINE__NUM_THREADS, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: "1"}}}
        {{- end }}
        - {name: HOME, value: /cache}
        - {name: XDG_CACHE_HOME, value: /cache}
        - {name: TRITON_CACHE_DIR, value: /cache/triton}
        {{- else }}
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        {{- with $block.env }}{{ toYaml . | nindent 8 }}{{ end }}
      ports:
        {{- toYaml $w.ports | nindent 8 }}
      resources: {{ mergeOverwrite (deepCopy $block.resources) (dict "limits" $limits) | toJson }}
      startupProbe: {{ mergeOverwrite (deepCopy $w.probes.startup) (dict "periodSeconds" 2 "timeoutSeconds" 5 "failureThreshold" (div (add (int $block.startupSeconds) 1) 2)) | toJson }}
      readinessProbe: {{ mergeOverwrite (deepCopy $w.probes.readiness) (dict "periodSeconds" 5 "timeoutSeconds" 3 "failureThreshold" 2) | toJson }}
      livenessProbe: {{ mergeOverwrite (dict "periodSeconds" 10 "timeoutSeconds" 5 "failureThreshold" 6) $w.probes.liveness | toJson }}
      {{- with $w.preStopSeconds }}
      lifecycle: {preStop: {exec: {command: [sleep, {{ . | quote }}]}}}
      {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]{{ if $asRoot }}, add: [IPC_LOCK]{{ end }}}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- include "baton.securityMounts" $root | nindent 8 }}
        {{- if $w.config }}
        - {name: config, mountPath: /etc/baton, readOnly: true}
        - {name: cache, mountPath: /cache}
        {{- end }}
        {{- if $weights }}
        - {name: weights, mountPath: {{ $spec.mountPath | default "/models" }}, readOnly: true}
        {{- end }}
        {{- if $files.bytes }}
        - {name: kv, mountPath: /kv}
        {{- end }}
        {{- if $shm }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $storage }}
        - {name: data, mountPath: {{ $storage.path }}}
        {{- end }}
        {{- with $block.volumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    {{- include "baton.securityVolumes" $root | nindent 4 }}
    {{- if $w.config }}
    - {name: config, configMap: {name: {{ $w.name }}}}
    - {name: cache, emptyDir: {}}
    {{- end }}
    {{- if $weights }}
    - {{ mergeOverwrite (dict "name" "weights") (include "baton.weights" (dict "root" $root "model" $w.model) | fromYaml) | toJson }}
    {{- end }}
    {{- if $files.bytes }}
    - {{ mergeOverwrite (dict "name" "kv") (include "baton.fileVolume" (dict "files" $files "model" $w.model) | fromYaml) | toJson }}
    {{- end }}
    {{- with $shm }}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ . }}}}
    {{- end }}
    {{- if and $storage (not $storage.size) }}
    - {name: data, emptyDir: {}}
    {{- end }}
    {{- with $block.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{- define "baton.asRoot" -}}{{/* a workload's block: something, where its pods are root's, which RDMA may need */}}
{{- $rdma := .rdma | default dict }}
{{- if and $rdma.resource $rdma.root }}root{{ end }}
{{- end }}

{{- define "baton.weights" -}}{{/* root, model: the volume source of its weights */}}
{{- $spec := get .root.Values.models .model }}
{{- if $spec.volume }}
{{ toYaml $spec.volume }}
{{- else }}
persistentVolumeClaim: {claimName: {{ include "baton.name" (dict "root" .root "model" .model "version" "" "component" "weights") }}}
{{- end }}
{{- end }}

{{- define "baton.fileVolume" -}}{{/* files, model */}}
{{- if .files.volume }}
{{ toYaml .files.volume }}
{{- else if .files.shared }}
{{- fail (printf "models.%s: fileTier.shared needs fileTier.volume, a file system that all workers see" .model) }}
{{- else }}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .files.storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources: {requests: {storage: {{ div (mul (include "baton.mebibytes" .files.bytes | int64) 11) 10 }}Mi}}
{{- end }}
{{- end }}
