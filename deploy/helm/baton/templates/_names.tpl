{{/* Names, labels, sizes. */}}

{{- define "baton.name" -}}{{/* dict root model version component */}}
{{- $name := list .root.Release.Name .model .version .component | compact | join "-" -}}
{{- if gt (len $name) 52 }}{{ fail (printf "the name %q is longer than 52 characters: shorten the release's or the model's" $name) }}{{ end -}}
{{- $name -}}
{{- end }}

{{- define "baton.merge" -}}{{/* dicts, or nothing → JSON of them all: later ones win, key by key, and null takes a key away */}}
{{- $out := dict -}}
{{- range $layer := . }}{{ range $key, $value := $layer | default dict -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $out $key -}}
{{- else if and (kindIs "map" $value) (kindIs "map" (get $out $key)) -}}
{{- $_ := set $out $key (include "baton.merge" (list (get $out $key) $value) | fromJson) -}}
{{- else -}}
{{- $_ := set $out $key $value -}}
{{- end -}}
{{- end }}{{ end -}}
{{- toJson $out -}}
{{- end }}

{{- define "baton.selector" -}}{{/* root, workload */ -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .workload.component }}
{{- with .workload.model }}
baton/model: {{ . | quote }}
{{- end }}
{{- if hasKey .workload "version" }}
baton/version: {{ .workload.version | quote }}
{{- end }}
{{- end }}

{{- define "baton.labels" -}}{{/* root, workload */ -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end }}

{{- define "baton.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary .Release.Name "default" .Values.serviceAccount.create) -}}
{{- end }}

{{- define "baton.image" -}}{{/* root, image: a whole reference or empty, kind */}}
{{- $tag := .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- .image | default (printf "%s:%s" (list .root.Values.image.registry (printf "baton-%s" .kind) | compact | join "/") $tag) -}}
{{- end }}

{{- define "baton.mebibytes" -}}{{/* 3Gi → 3072 */}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $scale := dict "Mi" 1 "Gi" 1024 "Ti" 1048576 -}}
{{- mul $number (get $scale (regexFind "[A-Z]i$" .)) -}}
{{- end }}

{{- define "baton.etcd" -}}{{/* URLs, comma-separated */}}
{{- if .Values.etcd.endpoints -}}
{{ join "," .Values.etcd.endpoints }}
{{- else -}}
{{- $name := include "baton.name" (dict "root" . "model" "" "version" "" "component" "etcd") -}}
{{- $urls := list -}}
{{- $scheme := ternary "https" "http" (not (empty (include "baton.etcdTLS" .))) -}}
{{- range $i := until (int .Values.etcd.replicas) }}{{ $urls = append $urls (printf "%s://%s-%d.%s:2379" $scheme $name $i $name) }}{{ end -}}
{{ join "," $urls }}
{{- end -}}
{{- end }}

{{- define "baton.etcdTLS" -}}{{/* something, where the chart's own etcd asks for certificates */}}
{{- with .Values.security.tls }}{{ if and .secret .etcd (not $.Values.etcd.endpoints) }}tls{{ end }}{{ end }}
{{- end }}
