{{- define "tramontane.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "tramontane.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "tramontane.labels" -}}
app.kubernetes.io/part-of: {{ include "tramontane.name" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tramontane.gatewayLabels" -}}
app.kubernetes.io/name: {{ include "tramontane.name" . }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "tramontane.restricted" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end }}

{{- define "tramontane.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tramontane.isBucket" -}}
{{- if contains "://" .Values.model.id }}true{{ end -}}
{{- end }}

{{- /* Fills /models/model: with the weights, or for a gateway without them. */ -}}
{{- define "tramontane.download" -}}
{{- $root := .root -}}
{{- if include "tramontane.isBucket" $root -}}
command: [python, -m, cluster.config.bucket_model, {{ $root.Values.model.id | quote }}, /models/model{{ if .without }}, {{ .without | quote }}{{ end }}]
{{- else -}}
command: [hf, download, {{ $root.Values.model.id | quote }}, --revision, {{ $root.Values.model.revision | quote }}, --local-dir, /models/model, --exclude, {{ .without | default "consolidated*" | quote }}]
{{- end }}
image: {{ include "tramontane.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
securityContext:
  {{- include "tramontane.restricted" $root | nindent 2 }}
env:
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ $root.Values.secretName }}
        key: hf-token
        optional: true
{{- end }}

{{- define "tramontane.rayToken" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "tramontane.name" . }}-ray
      key: auth_token
{{- end }}
