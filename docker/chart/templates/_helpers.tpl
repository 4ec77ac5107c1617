{{- define "panotriton.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "panotriton.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "panotriton.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "panotriton.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "panotriton.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* What the restricted pod security standard asks of every container. */}}
{{- define "panotriton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "panotriton.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Seconds from the preStop hook to SIGKILL: draining, requests in flight, and a margin to exit in. */}}
{{- define "panotriton.graceSeconds" -}}
{{ add .Values.shutdown.drainSeconds .Values.shutdown.exitTimeoutSeconds 15 }}
{{- end }}

{{- define "panotriton.repositoryAddress" -}}
{{- if eq .Values.repository.source "s3" }}{{ .Values.repository.s3.address }}
{{- else if eq .Values.repository.source "gcs" }}{{ .Values.repository.gcs.address }}
{{- else }}/models{{ end -}}
{{- end }}

{{/* Groups that wait for execution, over all replicas. `or vector(0)`: no series is no queue. */}}
{{- define "panotriton.pendingQuery" -}}
sum(nv_inference_pending_request_count{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.fullname" . }}-.*",model=~"{{ .Values.autoscaling.models }}"}) or vector(0)
{{- end }}

{{/* Seconds in queues per finished group. The floor is one group in the five minutes that are looked at: with
     none finished yet, what has waited is one group's. */}}
{{- define "panotriton.queueQuery" -}}
sum(rate(nv_inference_queue_duration_us{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.fullname" . }}-.*",model=~"{{ .Values.autoscaling.models }}"}[5m])) / 1e6 / clamp_min(sum(rate(nv_inference_request_success{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.fullname" . }}-.*",model="panorama"}[5m])), 0.0033) or vector(0)
{{- end }}
