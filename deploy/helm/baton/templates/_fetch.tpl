{{/* The job that fetches weights. */}}

{{- define "baton.fetch" -}}{{/* root, model, version: the job's spec */}}
{{- $values := .root.Values }}
{{- $mountPath := (get $values.models .model).mountPath | default "/models" }}
{{- $token := .version.fetch.tokenSecret | default dict -}}
backoffLimit: 10
template:
  metadata:
    labels:
      {{- include "baton.selector" (dict "root" .root "workload" (dict "component" "weights" "model" .model)) | nindent 6 }}
  spec:
    restartPolicy: OnFailure
    serviceAccountName: {{ include "baton.serviceAccount" .root }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    {{- with $values.image.pullSecrets }}
    imagePullSecrets: {{ toJson . }}
    {{- end }}
    securityContext:
      runAsNonRoot: true
      runAsUser: {{ int64 $values.security.runAsUser }}
      runAsGroup: {{ int64 $values.security.runAsUser }}
      fsGroup: {{ int64 $values.security.runAsUser }}
      fsGroupChangePolicy: OnRootMismatch
      seccompProfile: {type: RuntimeDefault}
    containers:
      - name: fetch
        image: {{ include "baton.image" (dict "root" .root "image" "" "kind" "router") }}
        imagePullPolicy: {{ $values.image.pullPolicy }}
        # Under another name until it is whole.
        command:
          - sh
          - -ec
          - |
            what=$REPOSITORY@$REVISION partial=$FOLDER.partial
            says() { cat "$1/.fetched" 2>/dev/null || echo "$2"; }
            if [ -e "$FOLDER/config.json" ]; then
              there=$(says "$FOLDER" "$what")
              [ "$there" != "$what" ] || exit 0
              echo "$FOLDER has $there and not $what: give what is new a path of its own (versions)" >&2
              exit 1
            fi
            [ "$(says "$partial" "")" = "$what" ] || rm -rf "$partial"
            mkdir -p "$partial"
            echo "$what" > "$partial/.fetched"
            trap exit TERM
            hf download "$REPOSITORY" --revision "$REVISION" --local-dir "$partial" &
            wait $!
            mv "$partial" "$FOLDER"
        env:
          - {name: REPOSITORY, value: {{ .version.fetch.repository | quote }}}
          - {name: REVISION, value: {{ .version.fetch.revision | default "main" | quote }}}
          - {name: FOLDER, value: {{ .version.path | quote }}}
          - {name: HOME, value: /tmp}
          {{- if $token.name }}
          - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ $token.name }}, key: {{ $token.key | default "token" }}}}}
          {{- end }}
        resources: {requests: {cpu: "1", memory: 1Gi}}
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts:
          - {name: weights, mountPath: {{ $mountPath }}}
          - {name: tmp, mountPath: /tmp}
    volumes:
      - {{ mergeOverwrite (dict "name" "weights") (include "baton.weights" (dict "root" .root "model" .model) | fromYaml) | toJson }}
      - {name: tmp, emptyDir: {}}
{{- end }}
