{{/* Certificates and passwords: what is mounted where, and the settings that say so. */}}

{{- define "baton.security" -}}{{/* root's context: the setting `security` */}}
{{- if not (or .Values.networkPolicy.enabled .Values.security.insecure) }}
{{- fail "networkPolicy.enabled=false: whoever reaches a pod would be believed, and with security.tls.secret still reads and writes KV, by Mooncake's ports; where something else keeps others out, say security.insecure=true" }}
{{- end }}
{{- if .Values.security.tls.secret -}}
{cert: /etc/baton-tls/tls.crt, key: /etc/baton-tls/tls.key, authority: /etc/baton-tls/ca.crt, name: {{ .Values.security.tls.name }}}
{{- else -}}
{insecure: true}
{{- end }}
{{- end }}

{{- define "baton.etcdAccess" -}}{{/* root's context: the setting `cluster.etcd_access` */}}
{{- $access := .Values.etcd.access }}
{{- if not .Values.etcd.endpoints }}
{{- if or $access.user $access.authoritySecret.name $access.certificateSecret }}{{ fail "etcd.access is for an etcd of your own: give etcd.endpoints" }}{{ end }}
{{- if include "baton.etcdTLS" . -}}
{authority: /etc/baton-tls/ca.crt, cert: /etc/baton-tls/tls.crt, key: /etc/baton-tls/tls.key, name: {{ .Values.security.tls.name }}}
{{- else -}}
{}
{{- end }}
{{- else }}
{{- $encrypted := hasPrefix "https:" (first .Values.etcd.endpoints) }}
{{- if ne $encrypted (not (empty $access.authoritySecret.name)) }}
{{- fail "etcd.access.authoritySecret belongs to etcd.endpoints at https://, and is needed there: who signed their certificate" }}
{{- end }}
{{- if and $access.certificateSecret (not $encrypted) }}{{ fail "etcd.access.certificateSecret is shown to etcd.endpoints at https:// alone" }}{{ end }}
{{- if ne (empty $access.user) (empty $access.passwordSecret.name) }}{{ fail "etcd.access: give user and passwordSecret, or neither" }}{{ end -}}
{
{{- if $encrypted }}authority: /etc/baton-etcd/ca.crt, name: {{ $access.name | quote }},{{ end }}
{{- if $access.certificateSecret }} cert: /etc/baton-etcd/tls.crt, key: /etc/baton-etcd/tls.key,{{ end }}
{{- if $access.user }} user: {{ $access.user | quote }}, password_file: /etc/baton-etcd/password{{ end -}}
}
{{- end }}
{{- end }}

{{- define "baton.securityVolumes" -}}{{/* root's context: volumes, those that are needed */}}
{{- with .Values.security.tls.secret }}
- {name: certificates, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if .Values.etcd.endpoints }}
{{- $access := .Values.etcd.access }}
{{- $sources := list }}
{{- with $access.authoritySecret }}{{ if .name }}
{{- $sources = append $sources (dict "secret" (dict "name" .name "items" (list (dict "key" .key "path" "ca.crt")))) }}
{{- end }}{{ end }}
{{- with $access.certificateSecret }}
{{- $items := list (dict "key" "tls.crt" "path" "tls.crt") (dict "key" "tls.key" "path" "tls.key") }}
{{- $sources = append $sources (dict "secret" (dict "name" . "items" $items)) }}
{{- end }}
{{- with $access.passwordSecret }}{{ if .name }}
{{- $sources = append $sources (dict "secret" (dict "name" .name "items" (list (dict "key" .key "path" "password")))) }}
{{- end }}{{ end }}
{{- with $sources }}
- {name: etcd-access, projected: {defaultMode: 0440, sources: {{ toJson . }}}}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.securityMounts" -}}
{{- range include "baton.securityVolumes" . | fromYamlArray }}
- {name: {{ .name }}, mountPath: {{ ternary "/etc/baton-tls" "/etc/baton-etcd" (eq .name "certificates") }}, readOnly: true}
{{- end }}
{{- end }}
